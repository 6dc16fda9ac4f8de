"""fp8 checkpoints in both spellings of ComfyUI, written here: the same numbers, and bytes kept where they can be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_demo
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.build import load_dit
from liveavatar_core.weights.layout import infer_config, lora_targets
from liveavatar_core.weights.lora import merge, open_lora
from liveavatar_core.weights.quant import Fp8Linear
from liveavatar_core.weights.reader import open_weights

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPELLINGS = ["old", "new", "new in the metadata", "prefixed", "by row"]
TOUCHED, UNTOUCHED = "blocks.1.ffn.0", "audio_injector.injector_adain_layers.1.linear"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def original(demo: DemoFiles) -> dict[str, Tensor]:
    return load_file(demo.single_file)


def quantised(tensors: dict[str, Tensor], dtype: torch.dtype = E4M3, by_row: bool = False) -> dict[str, Tensor]:
    """Every matrix of the layers, the head and the embeddings, as ComfyUI's converter would: values and factors."""
    scaled = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "cond_mask" in name:
            scaled[name] = tensor
            continue
        largest = tensor.float().abs().amax(1, keepdim=True) if by_row else tensor.float().abs().max()
        factor = largest / torch.finfo(dtype).max
        scaled[name] = (tensor.float() / factor).to(dtype)
        scaled[name.removesuffix(".weight") + ".weight_scale"] = factor
    return scaled


def write(path: Path, demo: DemoFiles, tensors: dict[str, Tensor], spelling: str = "new") -> Path:
    config = json.loads((demo.shards / "config.json").read_text())
    metadata = {"config": json.dumps({"transformer": config})}
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if spelling == "old":
        tensors = {name.replace(".weight_scale", ".scale_weight"): tensor for name, tensor in tensors.items()}
        tensors |= {f"{layer}.scale_input": torch.ones(()) for layer in layers}
        tensors["scaled_fp8"] = torch.zeros(2, dtype=E4M3)
    elif spelling == "new in the metadata":
        described = {layer: {"format": "float8_e4m3fn"} for layer in layers}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": described})
    else:
        remark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        tensors = tensors | {f"{layer}.comfy_quant": remark.clone() for layer in layers}
        tensors |= {f"{layer}.input_scale": torch.ones(()) for layer in layers}
    if spelling == "prefixed":
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["text_encoders.x.weight_scale"] = torch.ones(3)  # another model's, in a way of its own
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def load(path: Path, lora: Path | None = None, **how) -> nn.Module:
    with open_weights(path) as reader:
        config = infer_config(reader.infos(), reader.config)
        loras = [] if lora is None else [open_lora(lora)]
        model = load_dit(reader, config, loras=loras, device="cpu", **{"dtype": torch.bfloat16, **how})
    for opened in loras:
        opened.close()
    assert config == DEMO_CONFIG
    return model


def meant(scaled: dict[str, Tensor], name: str) -> Tensor:
    """The numbers a stored tensor stands for."""
    factor = scaled.get(name.removesuffix(".weight") + ".weight_scale")
    return scaled[name] if factor is None else scaled[name].float() * factor


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_the_file_stands_for(demo, original, tmp_path, spelling: str, dtype: torch.dtype):
    scaled = quantised(original, by_row=spelling == "by row")
    state = load(write(tmp_path / "a.safetensors", demo, scaled, spelling), dtype=dtype).state_dict()
    assert state.keys() == original.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, meant(scaled, name).to(tensor.dtype)), name
    error = max((state[name].float() - original[name].float()).abs().max() for name in state)
    assert 0 < error < 0.2, "not the demo's weights any more, or not quantised at all"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fp8_keeps_the_stored_bytes(demo, original, tmp_path, spelling: str):
    scaled = quantised(original, by_row=spelling == "by row")
    model = load(write(tmp_path / "a.safetensors", demo, scaled, spelling), fp8=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert TOUCHED in linears and UNTOUCHED in linears and "head.head" not in linears
    for name, linear in linears.items():
        if linear.weight_scale.numel() < scaled[f"{name}.weight_scale"].numel():
            continue  # a linear with one scale cannot keep one per row
        assert torch.equal(linear.weight.view(torch.uint8), scaled[f"{name}.weight"].view(torch.uint8)), name
        factor = scaled[f"{name}.weight_scale"].flatten()
        assert torch.equal(linear.weight_scale, factor.expand(linear.weight_scale.shape)), name
        stands_for = linear.weight.float() * linear.weight_scale.reshape(-1, 1)
        assert torch.equal(stands_for, meant(scaled, f"{name}.weight")), name
    assert torch.equal(model.head.head.weight, meant(scaled, "head.head.weight"))


@pytest.mark.parametrize("fp8", [False, True])
def test_a_lora_is_merged_into_the_numbers_and_quantised_once_more(demo, original, tmp_path, fp8: bool):
    scaled = quantised(original)
    model = load(write(tmp_path / "a.safetensors", demo, scaled), demo.lora, fp8=fp8)
    targets = lora_targets(DEMO_CONFIG)
    assert TOUCHED in targets and UNTOUCHED not in targets
    with open_lora(demo.lora) as lora:
        want = merge(meant(scaled, f"{TOUCHED}.weight").bfloat16(), TOUCHED, [lora])
    linear = model.get_submodule(TOUCHED)
    if fp8:
        expected = Fp8Linear(want.shape[1], want.shape[0])
        expected.store(want)
        assert torch.equal(linear.weight.view(torch.uint8), expected.weight.view(torch.uint8))
        assert torch.equal(linear.weight_scale, expected.weight_scale)
        untouched = model.get_submodule(UNTOUCHED).weight
        assert torch.equal(untouched.view(torch.uint8), scaled[f"{UNTOUCHED}.weight"].view(torch.uint8))
    else:
        assert torch.equal(linear.weight, want)


def test_fp8_without_factors_stands_for_itself(demo, original, tmp_path):
    plain = {name: tensor.to(E4M3) if tensor.ndim == 2 else tensor for name, tensor in original.items()}
    path = write(tmp_path / "a.safetensors", demo, plain)
    assert torch.equal(load(path).get_submodule(TOUCHED).weight, plain[f"{TOUCHED}.weight"].bfloat16())
    linear = load(path, fp8=True).get_submodule(TOUCHED)
    assert torch.equal(linear.weight.view(torch.uint8), plain[f"{TOUCHED}.weight"].view(torch.uint8))
    assert torch.equal(linear.weight_scale, torch.ones_like(linear.weight_scale))


def test_the_other_fp8_is_read_and_quantised_again(demo, original, tmp_path):
    """e5m2 is no format that cards multiply with our activations."""
    scaled = quantised(original, E5M2)
    path = write(tmp_path / "a.safetensors", demo, scaled)
    want = meant(scaled, f"{TOUCHED}.weight").bfloat16()
    assert torch.equal(load(path).get_submodule(TOUCHED).weight, want)
    expected = Fp8Linear(want.shape[1], want.shape[0])
    expected.store(want)
    linear = load(path, fp8=True).get_submodule(TOUCHED)
    assert torch.equal(linear.weight.view(torch.uint8), expected.weight.view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{TOUCHED}.weight": torch.zeros(128, 64, dtype=torch.int8)}, r"beside a weight of torch\.int8 \(128, 64\)"),
        ({f"{TOUCHED}.weight_scale": torch.ones(128, 2)}, r"a factor of shape \(128, 2\)"),
        ({"blocks.9.extra.weight_scale": torch.ones(())}, "beside no weight"),
    ],
)
def test_other_ways_of_quantising_are_refused(demo, original, tmp_path, change: dict[str, Tensor], words: str):
    path = write(tmp_path / "a.safetensors", demo, quantised(original) | change)
    with pytest.raises(WeightsError, match=words) as caught:
        open_weights(path)
    assert "use the bf16 or the fp8_scaled file" in str(caught.value) and "\n" not in str(caught.value)
