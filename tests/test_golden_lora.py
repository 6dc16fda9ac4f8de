"""The recorded LoRA: merged as the original merges it, in float32 and in bf16."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from liveavatar_core.weights.layout import lora_targets
from liveavatar_core.weights.lora import Lora, merge, open_lora

FLOAT32 = 1e-6  # another order of sums in the product
BF16_EQUAL = 0.998  # share of elements; the rest may fall to the other side of a rounding


@pytest.fixture
def recorded(golden) -> tuple[dict[str, torch.Tensor], dict]:
    return golden("lora")


@pytest.fixture
def base(golden) -> dict[str, torch.Tensor]:
    return golden("dit_weights")[0]


@pytest.fixture
def lora(recorded, tmp_path: Path, golden_config):
    """The recorded entries as a file, in the dtype they were recorded from."""
    tensors, manifest = recorded
    path = tmp_path / "lora.safetensors"
    save_file({key.removeprefix("lora."): t.bfloat16() for key, t in tensors.items() if key.startswith("lora.")}, path)
    with open_lora(path, manifest["scale"] / manifest["production"]["scale"]) as opened:
        opened.check(golden_config)
        yield opened


def merged(lora: Lora, base: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    return merge(base[name].to(dtype), name.removesuffix(".weight"), [lora])


def test_targets_are_the_weights_the_original_changed(recorded, golden_config) -> None:
    _, manifest = recorded
    assert sorted(f"{module}.weight" for module in lora_targets(golden_config)) == sorted(manifest["changed"])


def test_float32(recorded, base, lora: Lora, agree) -> None:
    tensors, _ = recorded
    names = [key.removeprefix("merged_fp32.") for key in tensors if key.startswith("merged_fp32.")]
    assert names
    for name in names:
        agree("lora", "merged_fp32", merged(lora, base, name, torch.float32), tensors[f"merged_fp32.{name}"], FLOAT32)


def test_every_changed_weight(recorded, base, lora: Lora, agree) -> None:
    tensors, manifest = recorded
    rows = []
    for name in manifest["changed"]:
        weight = merged(lora, base, name, torch.float32).double()
        rows.append(torch.stack((weight.square().mean().sqrt(), weight.flatten()[::53].sum())))
    got, want = torch.stack(rows), tensors["merged_stats"]
    agree("lora", "merged_stats rms", got[:, 0], want[:, 0], FLOAT32)
    agree("lora", "merged_stats sum", got[:, 1], want[:, 1], FLOAT32)


def test_bf16(recorded, base, lora: Lora, agree) -> None:
    tensors, _ = recorded
    names = [key.removeprefix("merged_bf16.") for key in tensors if key.startswith("merged_bf16.")]
    assert names
    for name in names:
        got, want = merged(lora, base, name, torch.bfloat16), tensors[f"merged_bf16.{name}"]
        unequal = (got != want).double().mean()
        agree("lora", "merged_bf16 unequal + 1", 1 + unequal, torch.ones((), dtype=torch.float64), 1 - BF16_EQUAL)
        assert bf16_steps(got, want) <= 1, name


def bf16_steps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in representable values."""

    def ordinal(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordinal(a) - ordinal(b)).abs().max())
