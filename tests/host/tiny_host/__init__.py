"""A pack for tests only: lets ComfyUI's own loaders read the demo's tiny files, in a host that is short of memory.

ComfyUI takes the sizes of umT5 and wav2vec2 from constants instead of the files. Here those constants are replaced by
the sizes in the JSON file that LIVEAVATAR_TINY_HOST names; every other line of the loaders and encoders that then
runs is ComfyUI's. The pack under test is not touched.
"""

import json
import os
import tempfile
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
from comfy.audio_encoders import audio_encoders
from comfy.text_encoders import wan

NODE_CLASS_MAPPINGS = {}  # ComfyUI takes a folder without it for a broken pack


def shrink_text_encoder(tiny: dict[str, int]) -> None:
    """CLIPLoader, type wan, reads umT5 of these sizes."""
    name = "umt5_config_xxl.json"
    full = json.loads(Path(wan.__file__).with_name(name).read_text())
    folder = Path(tempfile.mkdtemp())
    (folder / name).write_text(json.dumps({**full, **tiny}))
    wan.__file__ = str(folder / "wan.py")  # it looks for its config beside itself

    detect = comfy.sd.detect_te_model

    def detect_with_tiny(state_dict):
        embedding = state_dict.get("shared.weight")
        if embedding is not None and tuple(embedding.shape) == (tiny["vocab_size"], tiny["d_model"]):
            return comfy.sd.TEModel.T5_XXL
        return detect(state_dict)

    comfy.sd.detect_te_model = detect_with_tiny


def shrink_audio_encoder(tiny: dict[str, int]) -> None:
    """AudioEncoderLoader reads wav2vec2 of these sizes, in all else like the large one."""
    load = audio_encoders.load_audio_encoder_from_sd

    def load_with_tiny(state_dict, prefix=""):
        plain = comfy.utils.state_dict_prefix_replace(dict(state_dict), {"wav2vec2.": ""})
        norm = plain.get("encoder.layer_norm.bias")
        if norm is None or norm.shape[0] != tiny["embed_dim"]:
            return load(state_dict, prefix)
        like_large = {"conv_norm": True, "conv_bias": True, "do_normalize": True, "do_stable_layer_norm": True}
        encoder = audio_encoders.AudioEncoderModel({"model_type": "wav2vec2", **like_large, **tiny})
        missing, _ = encoder.load_sd(plain)
        assert not missing, f"the tiny wav2vec2 lacks {missing}"
        return encoder

    audio_encoders.load_audio_encoder_from_sd = load_with_tiny


def want_all_memory() -> None:
    """Every piece of speech makes the host ask all models for all their memory, as on a card that is almost full."""
    encode = audio_encoders.AudioEncoderModel.encode_audio

    def encode_in_need(self, *arguments):
        comfy.model_management.unload_all_models()
        return encode(self, *arguments)

    audio_encoders.AudioEncoderModel.encode_audio = encode_in_need


sizes = json.loads(Path(os.environ["LIVEAVATAR_TINY_HOST"]).read_text())
shrink_text_encoder(sizes["text"])
shrink_audio_encoder(sizes["speech"])
want_all_memory()
