"""The demo model: complete, reproducible, and loadable by the libraries and the host that read the real files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from liveavatar_core.config import LoraSpec, ModelSpec
from liveavatar_core.demo.choice import demo_files
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, vae_shapes, write_demo
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.build import load_dit
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import open_weights


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_small_and_plain_about_itself(demo: DemoFiles) -> None:
    assert sum(map(len, contents(demo.root).values())) < 14e6
    assert "random" in json.loads((demo.root / "demo.json").read_text())["about"]
    assert len(list(demo.shards.glob("*.safetensors"))) == 2


def test_same_seed_same_bytes_and_other_seed_other_weights(demo: DemoFiles, tmp_path: Path) -> None:
    assert contents(write_demo(tmp_path / "same").root) == contents(demo.root)
    other = write_demo(tmp_path / "other", seed=1)
    for file in ("single_file", "lora", "vae", "text_encoder"):
        assert getattr(other, file).read_bytes() != getattr(demo, file).read_bytes(), file


def test_reused_when_complete_and_rewritten_when_not(tmp_path: Path) -> None:
    demo = write_demo(tmp_path / "demo")
    written = demo.lora.stat().st_mtime_ns
    assert write_demo(tmp_path / "demo") == demo
    assert demo.lora.stat().st_mtime_ns == written
    before = demo.vae.read_bytes()
    demo.vae.write_bytes(before[:-1])
    write_demo(tmp_path / "demo")
    assert demo.vae.read_bytes() == before
    write_demo(tmp_path / "demo", seed=3)
    assert demo.vae.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_never_replaces_what_is_not_a_demo(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WeightsError, match="not empty and holds no demo"):
        write_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_trained_model_is_taken_where_there_is_one(demo: DemoFiles, tmp_path: Path) -> None:
    shipped = tmp_path / "models"
    assert demo_files(demo.root, shipped) == demo and demo.model == ModelSpec(demo.shards, (LoraSpec(demo.lora),))
    trained = DemoFiles(shipped)
    for folder in ("diffusion_models", "vae", "text_encoders", "audio_encoders"):
        shutil.copytree(demo.root / folder, trained.root / folder)
    assert demo_files(demo.root, shipped) == demo, "not finished yet"
    trained.stamp(about="trained on drawings")
    assert demo_files(tmp_path / "cache", shipped) == trained and not (tmp_path / "cache").exists()
    assert trained.model == ModelSpec(trained.single_file) and trained.about == "trained on drawings"
    assert trained.config == DEMO_CONFIG and trained.text_config == demo.text_config
    trained.vae.write_bytes(trained.vae.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="vae.safetensors has .* bytes.*get this pack again"):
        demo_files(demo.root, shipped)


def test_both_dit_layouts_hold_the_same_model(demo: DemoFiles) -> None:
    single = load_file(demo.single_file)
    shards = {name: t for file in demo.shards.glob("*.safetensors") for name, t in load_file(file).items()}
    assert single.keys() == shards.keys()
    assert all(torch.equal(single[name], shards[name]) for name in single)


def test_dit_makes_numbers_of_unit_order(demo: DemoFiles) -> None:
    with open_weights(demo.single_file) as reader, open_lora(demo.lora) as lora:
        config = infer_config(reader.infos(), reader.config)
        model = load_dit(reader, config, loras=[lora], dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(1, config.audio_states, config.audio_dim, 12, generator=generator)
    x = model.embed_block(torch.randn(config.channels, 3, 8, 8, generator=generator))
    text = model.embed_text(torch.randn(7, config.text_dim, generator=generator))
    time = model.time_table(1000.0)
    tokens = model.casual_audio_encoder.block(audio, torch.float32)
    for value in (x, time.modulation, tokens.local, tokens.pooled, *text[0]):
        assert 0.05 < value.std() < 5
    velocity = model.velocity(x, time, (4, 4))
    assert velocity.isfinite().all() and 0.1 < velocity.std() < 5


def test_vae_has_the_official_names_and_shapes(golden) -> None:
    tensors, _ = golden("vae_weights")
    base = tensors["decoder.head.0.gamma"].shape[0]
    assert vae_shapes(base) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_vae_loads_in_diffusers(demo: DemoFiles) -> None:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = {name: tensor.float() for name, tensor in load_file(demo.vae).items()}
    vae = AutoencoderKLWan(base_dim=weights["decoder.head.0.gamma"].shape[0])
    vae.load_state_dict(convert_wan_vae_to_diffusers(weights))
    with torch.no_grad():
        latent = vae.encode(torch.rand(1, 3, 5, 16, 16) * 2 - 1).latent_dist.mode()
        pixels = vae.decode(latent).sample
    assert latent.shape == (1, 16, 2, 2, 2) and 0.05 < latent.std() < 5
    assert pixels.shape == (1, 3, 5, 16, 16) and 0.05 < pixels.std() < 5


def test_text_encoder_loads_in_transformers(demo: DemoFiles) -> None:
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5Config, UMT5EncoderModel

    weights = load_file(demo.text_encoder)
    tokenizer = SentencePieceProcessor(model_proto=weights.pop("spiece_model").numpy().tobytes(), add_eos=True)
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2)
    assert tokenizer.get_piece_size() <= demo.text_config["vocab_size"]
    sentence = "A woman talks quietly. 你好"
    tokens = tokenizer.encode(sentence)
    assert tokens[-1] == 1 and tokenizer.decode(tokens) == sentence
    config = UMT5Config(**demo.text_config, feed_forward_proj="gated-gelu")
    encoder = UMT5EncoderModel(config).eval()
    result = encoder.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == [] and result.missing_keys == ["encoder.embed_tokens.weight"]  # tied to `shared`
    with torch.no_grad():
        states = encoder(input_ids=torch.tensor([tokens])).last_hidden_state
    assert states.shape[-1] == DEMO_CONFIG.text_dim and 0.5 < states.std() < 2


def test_speech_encoder_loads_in_transformers(demo: DemoFiles) -> None:
    from transformers import Wav2Vec2Model

    encoder, report = Wav2Vec2Model.from_pretrained(
        demo.speech_encoder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight", "lm_head.bias"}
    with torch.no_grad():
        states = encoder(torch.randn(1, 6000), output_hidden_states=True).hidden_states
    assert len(states) == DEMO_CONFIG.audio_states
    assert all(state.shape == (1, 18, DEMO_CONFIG.audio_dim) and 0.3 < state.std() < 5 for state in states)


IN_THE_HOST = """
import sys
from pathlib import Path

sys.argv = ["host", "--cpu"]
import comfy.options

comfy.options.enable_args_parsing()
import comfy.sd
import comfy.utils
import torch
from comfy.audio_encoders.audio_encoders import AudioEncoderModel
from comfy.text_encoders.wan import WanT5Model, WanT5Tokenizer

from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG
from training.speaker import read_text_encoder

PROMPT = "A woman talks, Soft light. 你好"
demo = DemoFiles(Path(sys.stdin.read()))
weights = comfy.utils.load_torch_file(str(demo.vae))
vae = comfy.sd.VAE(sd=weights)
assert type(vae.first_stage_model).__module__ == "comfy.ldm.wan.vae"
assert vae.first_stage_model.state_dict().keys() == weights.keys()
assert vae.decode(torch.randn(1, 16, 2, 4, 4)).shape == (1, 5, 32, 32, 3)

weights = comfy.utils.load_torch_file(str(demo.text_encoder))
tokenizer = WanT5Tokenizer(tokenizer_data={"spiece_model": weights.pop("spiece_model")})
encoder = WanT5Model(dtype=torch.float32, model_options={"umt5xxl_model_config": demo.text_config})
result = encoder.load_sd(weights)
assert not result.missing_keys and not result.unexpected_keys, result
states = encoder.encode_token_weights(tokenizer.tokenize_with_weights(PROMPT))[0]
assert states.shape == (1, 512, DEMO_CONFIG.text_dim)
# what a model was trained with is what it will be given
expected = read_text_encoder(demo)([PROMPT])
length = expected.shape[1]
torch.testing.assert_close(states[:, :length].float(), expected, rtol=1e-3, atol=1e-4)
assert expected.any() and not states[:, length:].any()

weights = comfy.utils.load_torch_file(str(demo.speech_encoder / "model.safetensors"))
weights = comfy.utils.state_dict_prefix_replace(weights, {"wav2vec2.": ""})
sizes = {"embed_dim": DEMO_CONFIG.audio_dim, "num_heads": 4, "num_layers": DEMO_CONFIG.audio_states - 1}
encoder = AudioEncoderModel({"model_type": "wav2vec2", **sizes})
result = encoder.load_sd(weights)
assert not result.missing_keys and set(result.unexpected_keys) == {"lm_head.weight", "lm_head.bias"}, result
assert len(encoder.encode_audio(torch.randn(1, 1, 8000), 16000)["encoded_audio_all_layers"]) == DEMO_CONFIG.audio_states
"""


@pytest.mark.skipif("LIVEAVATAR_COMFYUI" not in os.environ, reason="no ComfyUI here; `python run.py test` brings it")
def test_everything_loads_in_the_host(demo: DemoFiles) -> None:
    """In a process of its own: the host reads sys.argv and changes global settings of torch."""
    paths = os.pathsep.join((os.environ["LIVEAVATAR_COMFYUI"], str(Path(__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_HOST],
        input=str(demo.root),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
