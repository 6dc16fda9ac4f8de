"""Converted files: the bits of loading the sources, written whole or not at all, used only as they were made."""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liveavatar_core.config import LoraSpec, ModelSpec, RuntimeSpec
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_demo
from liveavatar_core.errors import ConfigError, OutputError, WeightsError
from liveavatar_core.runtime.runtime import Runtime, inspect_model
from liveavatar_core.weights import writer
from liveavatar_core.weights.build import load_dit
from liveavatar_core.weights.convert import convert, main
from liveavatar_core.weights.file import TensorInfo
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import open_weights

STRENGTHS = (0.7, -0.2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def model(demo: DemoFiles) -> ModelSpec:
    return ModelSpec(demo.shards, tuple(LoraSpec(demo.lora, strength) for strength in STRENGTHS))


@pytest.fixture(scope="module")
def converted(model: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(model, tmp_path_factory.mktemp("converted") / "new folder" / "a.safetensors").checkpoint


def load(model: ModelSpec, precision: str, layers: range | None = None) -> nn.Module:
    with open_weights(model.checkpoint) as reader:
        config = infer_config(reader.infos(), reader.config)
        loras = [open_lora(spec.path, spec.strength) for spec in model.loras]
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        dit = load_dit(reader, config, layers=layers, loras=loras, dtype=dtype, device="cpu", fp8=precision == "fp8")
    for lora in loras:
        lora.close()
    assert config == DEMO_CONFIG
    return dit


def assert_same(got: nn.Module, want: nn.Module) -> None:
    tensors = got.state_dict()
    assert tensors.keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        assert torch.equal(as_bytes(tensors[name]), as_bytes(tensor)), name


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("layers", [None, range(1, 3)])
def test_loading_gives_the_bits_of_loading_the_sources(model, tmp_path, precision: str, layers: range | None):
    made = convert(model, tmp_path / "a.safetensors", precision=precision)
    assert made == ModelSpec(tmp_path / "a.safetensors")
    assert_same(load(made, precision, layers), load(model, precision, layers))


def test_a_source_that_is_fp8_already_keeps_its_bytes(demo, tmp_path):
    factor = 1 / 448
    tensors = {}
    for name, tensor in load_file(demo.single_file).items():
        linear = name.endswith("ffn.0.weight")
        tensors[name] = (tensor.float() / factor).to(torch.float8_e4m3fn) if linear else tensor
        if linear:
            tensors[name.removesuffix("weight") + "weight_scale"] = torch.tensor(factor)
    config = json.loads((demo.shards / "config.json").read_text())
    save_file(tensors, tmp_path / "scaled.safetensors", {"config": json.dumps({"transformer": config})})
    source = ModelSpec(tmp_path / "scaled.safetensors")
    assert_same(load(convert(source, tmp_path / "a.safetensors"), "fp8"), load(source, "fp8"))
    stored = load_file(tmp_path / "a.safetensors")["blocks.0.ffn.0.weight"]
    assert torch.equal(as_bytes(stored), as_bytes(tensors["blocks.0.ffn.0.weight"]))


def test_the_file_is_small_and_says_what_it_is(model, demo, converted):
    with safe_open(converted, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["live_avatar"])
    shards = sorted(demo.shards.glob("*.safetensors"))
    assert record["version"] == 1 and record["precision"] == "fp8"
    assert record["checkpoint"] == [
        {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest(), "strength": None} for path in shards
    ]
    lora = sha256(demo.lora.read_bytes()).hexdigest()
    assert record["loras"] == [{"name": demo.lora.name, "sha256": lora, "strength": s} for s in STRENGTHS]
    assert json.loads(metadata["config"])["transformer"]["num_heads"] == DEMO_CONFIG.heads
    stored = load_file(converted)
    assert stored["time_projection.1.weight"].dtype == torch.bfloat16, "not widened on disk"
    assert stored["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn
    assert all(name.endswith("_scale") for name, tensor in stored.items() if tensor.dtype == torch.float32)


def test_progress_counts_hashing_and_reading_and_may_cancel(model, demo, tmp_path):
    seen: list[tuple[int, int]] = []
    convert(model, tmp_path / "a.safetensors", progress=lambda *bytes_: seen.append(bytes_))
    done = [done for done, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] > 2 * demo.lora.stat().st_size

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise Stop

    with pytest.raises(Stop):
        convert(model, tmp_path / "b.safetensors", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_tensors_are_let_go_once_written(tmp_path):
    made: list[weakref.ref] = []
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i in range(5):
            alive.append(sum(tensor() is not None for tensor in made))
            tensor = torch.full((7,), float(i))
            made.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    infos = {f"t{i}": TensorInfo((7,), torch.float32) for i in range(5)}
    writer.write_tensors(tmp_path / "a.safetensors", infos, {}, tensors())
    assert max(alive) == 1, "at most the one before is still there"


def test_any_shape_and_type_is_read_back_by_the_library(tmp_path):
    tensors = {
        "odd bytes": torch.arange(3, dtype=torch.uint8).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(5).bfloat16(),
        "view": torch.arange(12).reshape(3, 4).t(),
    }
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer.write_tensors(tmp_path / "a.safetensors", infos, {"a": "ü"}, reversed(list(tensors.items())))
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        begin = 8 + length + entry["data_offsets"][0] if name in infos else 0
        assert name == "__metadata__" or begin % infos[name].dtype.itemsize == 0, "readers may view the bytes in place"
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(as_bytes(read[name]), as_bytes(tensor)) for name, tensor in tensors.items())
    assert {name: tensor.shape for name, tensor in read.items()} == {name: t.shape for name, t in tensors.items()}


def test_a_tensor_that_never_came_is_noticed(tmp_path):
    infos = {name: TensorInfo((2,), torch.float32) for name in "ab"}
    with pytest.raises(RuntimeError, match="1 tensors were announced and never came, b first"):
        writer.write_tensors(tmp_path / "a.safetensors", infos, {}, [("a", torch.zeros(2))])
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Writing beyond this fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(model, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    with largest_file(100_000), pytest.raises(OutputError, match=r"a\.safetensors cannot be written \(.+\); free"):
        convert(model, out)
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]


def test_a_disk_without_room_is_refused_before_anything_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    read: list[int] = []
    with pytest.raises(OutputError, match=r"needs 0\.0 GiB of disk and 0\.0 GiB are free"):
        convert(model, tmp_path / "a.safetensors", progress=lambda done, total: read.append(done))
    assert read == [] and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be used \(.+\); choose another folder"):
        convert(model, tmp_path / "file" / "a.safetensors")


def test_sources_are_not_overwritten(demo):
    with pytest.raises(OutputError, match="is one of the files to convert"):
        convert(ModelSpec(demo.single_file), demo.single_file)
    with pytest.raises(OutputError, match="is one of the files to convert"):
        convert(ModelSpec(demo.single_file, (LoraSpec(demo.lora),)), demo.lora)


def test_a_finished_file_is_kept_and_another_is_replaced(model, demo, tmp_path):
    out = tmp_path / "a.safetensors"
    convert(model, out)
    stamp = out.stat().st_mtime_ns
    convert(model, out)
    assert out.stat().st_mtime_ns == stamp
    plain = ModelSpec(demo.shards)
    assert_same(load(convert(plain, out), "fp8"), load(plain, "fp8"))


def test_another_lora_is_refused(model, demo, converted):
    extra = ModelSpec(converted, (LoraSpec(demo.lora),))
    words = (
        "was converted with live_avatar_demo_lora.safetensors, live_avatar_demo_lora.safetensors merged and takes no"
    )
    for use in (inspect_model, lambda spec: load(spec, "fp8"), lambda spec: convert(spec, converted.parent / "b")):
        with pytest.raises(WeightsError, match=words) as caught:
            use(extra)
        assert "\n" not in str(caught.value)
    assert not (converted.parent / "b").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_another_precision_is_refused(converted, precision: str):
    runtime, model = Runtime(), ModelSpec(converted)
    words = f"was converted for precision fp8 and cannot run in {precision}; choose fp8 or auto"
    with pytest.raises(WeightsError, match=words) as caught:
        runtime.ensure(model, DEMO_CONFIG, RuntimeSpec(("cpu",), precision=precision), 4)
    assert "\n" not in str(caught.value)


def test_auto_is_what_the_file_was_made_for(model, converted):
    runtime = Runtime()
    runtime.ensure(ModelSpec(converted), DEMO_CONFIG, RuntimeSpec(("cpu",)), 4)
    (resident,) = runtime._models.values()
    assert_same(resident, load(model, "fp8"))


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 2}', '{"version": 1, "precision": 3}'])
def test_a_damaged_record(converted, tmp_path, text: str):
    save_file(load_file(converted), tmp_path / "a.safetensors", {"live_avatar": text})
    with pytest.raises(WeightsError, match="convert the original again"):
        open_weights(tmp_path / "a.safetensors")


def test_unknown_precision(model, tmp_path):
    with pytest.raises(ConfigError, match="precision is 'fp32'; a file can be made for fp8 or bf16"):
        convert(model, tmp_path / "a.safetensors", precision="fp32")


def test_command_line(model, demo, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    main([str(demo.shards), "--lora", f"{demo.lora}=0.7", "--lora", f"{demo.lora}=-0.2", "--out", str(out)])
    assert_same(load(ModelSpec(out), "fp8"), load(model, "fp8"))
    assert "100 %" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing does not exist"):
        main([str(tmp_path / "nothing"), "--lora", str(demo.lora), "--out", str(out)])
