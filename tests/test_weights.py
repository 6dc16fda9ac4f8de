"""Checkpoints: what opens, what is refused and in which words, and what a stage reads."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.published_files import tensors_of
from liveavatar_core.config import LIVE_AVATAR_14B
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_demo
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.build import empty_dit, load_dit
from liveavatar_core.weights.file import TensorInfo
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.quant import FP8, Fp8Linear
from liveavatar_core.weights.reader import MARKER, open_weights

CPU = {"dtype": torch.bfloat16, "device": "cpu"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture
def tensors(demo: DemoFiles) -> dict[str, torch.Tensor]:
    """A copy of the demo's DiT to damage."""
    return dict(load_file(demo.single_file))


def published_infos() -> dict[str, TensorInfo]:
    return tensors_of("wan2.2_s2v_14B")


def rewrite(path: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    metadata = None if config is None else {"config": json.dumps(config)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def stated(demo: DemoFiles) -> dict:
    return json.loads((demo.shards / "config.json").read_text())


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught, open_weights(path) as reader:
        load_dit(reader, infer_config(reader.infos(), reader.config), **CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_model_has_the_published_names_and_shapes() -> None:
    model = empty_dit(LIVE_AVATAR_14B).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in model.items()} == {
        name: info.shape for name, info in published_infos().items()
    }
    assert sum(tensor.numel() for tensor in model.values()) == 16_295_755_609


@pytest.mark.parametrize("stages", [2, 3, 7])
def test_stages_own_every_tensor_of_the_published_model(stages: int) -> None:
    cuts = [LIVE_AVATAR_14B.layers * i // stages for i in range(stages + 1)]
    owned = [set(empty_dit(LIVE_AVATAR_14B, range(a, b)).state_dict()) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert set().union(*owned) == published_infos().keys()
    shared = [name for name in owned[0] & owned[1] if not name.startswith(("text_embedding.", "time_"))]
    assert shared == []


def test_shapes_alone_give_the_published_config() -> None:
    assert infer_config(published_infos(), None) == LIVE_AVATAR_14B


def test_recorded_weights_are_the_model_of_their_config(golden, golden_config) -> None:
    tensors, _ = golden("dit_weights")
    stated = golden.config
    assert (golden_config.dim, golden_config.heads) == (stated["dim"], stated["num_heads"])
    assert (golden_config.layers, golden_config.ffn_dim) == (stated["num_layers"], stated["ffn_dim"])
    assert golden_config.audio_layers == tuple(stated["audio_inject_layers"])
    assert (golden_config.text_dim, golden_config.text_len) == (stated["text_dim"], stated["text_len"])
    assert {name: tensor.shape for name, tensor in empty_dit(golden_config).state_dict().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("layout", ["shards", "one file in a folder", "single file", "prefixed", "short prefix"])
def test_every_layout_gives_the_same_model(demo: DemoFiles, tensors, tmp_path: Path, layout: str) -> None:
    path = {"shards": demo.shards, "single file": demo.single_file}.get(layout)
    if layout == "one file in a folder":
        path = tmp_path
        rewrite(path / "model.safetensors", tensors)
        (path / "config.json").write_text(json.dumps(stated(demo)))
    elif path is None:
        prefix = "model.diffusion_model." if layout == "prefixed" else "diffusion_model."
        renamed = {prefix + name: tensor for name, tensor in tensors.items()} | {"other.weight": torch.zeros(1)}
        path = rewrite(tmp_path / "model.safetensors", renamed, {"transformer": stated(demo)})
    with open_weights(path) as reader:
        config = infer_config(reader.infos(), reader.config)
        model = load_dit(reader, config, **CPU)
    assert config == DEMO_CONFIG
    loaded = model.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in tensors.items())


def test_opening_reads_no_tensor_and_a_stage_reads_only_its_own(demo: DemoFiles, monkeypatch) -> None:
    with open_weights(demo.shards) as reader:
        read = []
        get = reader.get
        monkeypatch.setattr(reader, "get", lambda name, *device: read.append(name) or get(name, *device))
        progress = []
        stage = range(1, 3)
        model = load_dit(reader, DEMO_CONFIG, layers=stage, progress=lambda *bytes_: progress.append(bytes_), **CPU)
        needed = list(empty_dit(DEMO_CONFIG, stage).state_dict())
        assert read == needed == list(model.state_dict())
        assert progress[-1][0] == progress[-1][1] == sum(2 * get(name).numel() for name in needed)
        assert [done for done, _ in progress] == sorted({done for done, _ in progress})


def test_progress_may_cancel(demo: DemoFiles) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with open_weights(demo.shards) as reader, pytest.raises(Stop):
        load_dit(reader, DEMO_CONFIG, progress=stop, **CPU)


def test_model_is_frozen_and_computes_in_float32_where_it_must(demo: DemoFiles) -> None:
    with open_weights(demo.shards) as reader:
        model = load_dit(reader, DEMO_CONFIG, **CPU)
    float32 = re.compile(r"time_|head\.|casual_audio_encoder\.|blocks\.\d+\.modulation")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if float32.match(name) else torch.bfloat16), name
        assert not parameter.requires_grad and not parameter.is_meta
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_lora_is_merged_before_the_weight_is_quantised(demo: DemoFiles) -> None:
    name = "blocks.1.ffn.0"
    with open_weights(demo.shards) as reader, open_lora(demo.lora, 0.7) as lora:
        plain = load_dit(reader, DEMO_CONFIG, **CPU)
        merged = load_dit(reader, DEMO_CONFIG, loras=[lora], **CPU)
        packed = load_dit(reader, DEMO_CONFIG, loras=[lora], fp8=True, **CPU)
        want = (plain.get_submodule(name).weight.float() + lora.delta(name)).bfloat16()
    assert torch.equal(merged.get_submodule(name).weight, want)
    assert not torch.equal(plain.get_submodule(name).weight, want)
    linear = packed.get_submodule(name)
    assert isinstance(linear, Fp8Linear) and linear.weight.dtype == FP8
    assert torch.equal(linear.bias, merged.get_submodule(name).bias)
    expected = Fp8Linear(want.shape[1], want.shape[0])
    expected.store(want)
    assert torch.equal(linear.weight.view(torch.uint8), expected.weight.view(torch.uint8))
    assert not any(parameter.is_meta for parameter in packed.parameters())


def test_lora_of_another_model_is_refused_before_anything_is_read(demo: DemoFiles, monkeypatch) -> None:
    other = replace(DEMO_CONFIG, ffn_dim=2 * DEMO_CONFIG.ffn_dim)
    with open_weights(demo.shards) as reader, open_lora(demo.lora) as lora:
        monkeypatch.setattr(reader, "get", None)
        with pytest.raises(WeightsError, match="LoRA of another model: 40 of this model's 48 modules match"):
            load_dit(reader, other, loras=[lora], **CPU)


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing")


def test_folder_without_index(tmp_path: Path) -> None:
    assert "no *.safetensors.index.json and 0 safetensors files" in refusal(tmp_path)


def test_shard_of_the_index_is_missing(demo: DemoFiles, tmp_path: Path) -> None:
    for file in demo.shards.iterdir():
        if "00002-of" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "diffusion_pytorch_model-00002-of-00002.safetensors is named in" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [-100, 20, 0])
def test_truncated_file(demo: DemoFiles, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(demo.single_file.read_bytes()[:keep])
    assert f"{path} is not a complete safetensors file" in refusal(path)


def test_another_model(demo: DemoFiles) -> None:
    assert f"not a speech-to-video model: it has no {MARKER}" in refusal(demo.vae)


def test_quantised_checkpoint(tensors, tmp_path: Path) -> None:
    tensors["blocks.0.ffn.0.scale_weight"] = torch.ones(())
    assert "already quantised (blocks.0.ffn.0.scale_weight)" in refusal(rewrite(tmp_path / "a.safetensors", tensors))


def test_missing_unexpected_and_misshapen_tensors_are_named(demo: DemoFiles, tensors, tmp_path: Path) -> None:
    del tensors["blocks.3.norm3.bias"]
    tensors["blocks.2.extra"] = torch.zeros(1)
    tensors["blocks.1.modulation"] = torch.zeros(1, 5, DEMO_CONFIG.dim)
    message = refusal(rewrite(tmp_path / "a.safetensors", tensors, stated(demo)))
    assert "1 missing (blocks.3.norm3.bias)" in message
    assert "1 unexpected (blocks.2.extra)" in message
    assert "1 of another shape (blocks.1.modulation (1, 5, 64) instead of (1, 6, 64))" in message


def test_tensor_that_gives_a_size_is_missing(demo: DemoFiles, tensors, tmp_path: Path) -> None:
    del tensors["time_embedding.0.weight"]
    assert "no time_embedding.0.weight" in refusal(rewrite(tmp_path / "a.safetensors", tensors, stated(demo)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 128}, "config.json says dim=128 but the tensors say 64"),
        ({"num_layers": 5}, "config.json says num_layers=5 but the tensors say 4"),
        ({"num_audio_token": 2}, "config.json says num_audio_token=2 but the tensors say 4"),
        ({"num_heads": 3}, "dim=64 is not divisible by heads=3"),
        ({"audio_inject_layers": [0, 1, 2]}, "names 3 audio layers but the tensors have 2 injectors"),
        ({"audio_inject_layers": [0, 9]}, "audio_layers=(0, 9) are not all within 0..3"),
        ({"num_heads": None}, "needs a config.json with num_heads"),
        ({"audio_inject_layers": None}, "needs a config.json with audio_inject_layers"),
    ],
)
def test_config_must_agree_with_the_tensors(demo: DemoFiles, tensors, tmp_path: Path, change: dict, words: str) -> None:
    config = {key: value for key, value in (stated(demo) | change).items() if value is not None}
    assert words in refusal(rewrite(tmp_path / "a.safetensors", tensors, {"transformer": config}))


def test_unreadable_config(demo: DemoFiles, tensors, tmp_path: Path) -> None:
    rewrite(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{")
    assert "config.json holds JSON that cannot be read" in refusal(tmp_path)
