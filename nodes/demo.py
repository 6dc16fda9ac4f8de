"""A loader for the demo model: the sockets of the real loaders, filled with small files."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
from comfy.audio_encoders.audio_encoders import AudioEncoderModel
from comfy_api.latest import io

from . import host
from .types import CATEGORY, ModelSocket


class DemoLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_DemoLoader",
            display_name="Live Avatar Demo Model",
            category=CATEGORY,
            description="A small model of the real classes, for trying nodes and workflows on any machine. When it "
            "runs, it says what its weights are: trained on drawn faces, or random, and then the picture is noise. For "
            "a real video use the Model Loader and the real files.",
            search_aliases=["test model", "example", "try"],
            hidden=[io.Hidden.unique_id],
            outputs=[
                ModelSocket.Output("LIVEAVATAR_MODEL", display_name="model", tooltip="In place of a Model Loader."),
                io.Clip.Output("CLIP", display_name="clip", tooltip="To the Prompt Conditioner."),
                io.Vae.Output("VAE", display_name="vae", tooltip="To the Chunked Sampler and the decoder."),
                io.AudioEncoder.Output("AUDIO_ENCODER", display_name="audio_encoder", tooltip="To the Audio Encoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from liveavatar_core.demo.choice import demo_files

        files = demo_files(Path(folder_paths.models_dir) / "liveavatar" / "demo")
        host.say(cls.hidden.unique_id, files.about)
        return io.NodeOutput(files.model, _clip(files), _vae(files), _audio_encoder(files))


def _clip(files) -> comfy.sd.CLIP:
    state = comfy.utils.load_torch_file(str(files.text_encoder))
    wan = comfy.text_encoders.wan
    return comfy.sd.CLIP(
        SimpleNamespace(params={}, clip=wan.te(), tokenizer=wan.WanT5Tokenizer),
        tokenizer_data={"spiece_model": state.pop("spiece_model")},
        state_dict=[state],
        model_options={"umt5xxl_model_config": files.text_config},
    )


def _vae(files) -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(files.vae)))
    vae.throw_exception_if_invalid()
    return vae


def _audio_encoder(files) -> AudioEncoderModel:
    state = comfy.utils.load_torch_file(str(files.speech_encoder / "model.safetensors"))
    state = comfy.utils.state_dict_prefix_replace(state, {"wav2vec2.": ""})
    sizes = json.loads((files.speech_encoder / "config.json").read_text(encoding="utf-8"))
    encoder = AudioEncoderModel(
        {
            "model_type": "wav2vec2",
            "embed_dim": sizes["hidden_size"],
            "num_heads": sizes["num_attention_heads"],
            "num_layers": sizes["num_hidden_layers"],
        }
    )
    encoder.load_sd(state)
    return encoder
