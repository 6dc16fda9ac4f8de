"""LoRA files: spellings, scale, and what is refused in which words."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liveavatar_core.config import LIVE_AVATAR_14B
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_demo
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.layout import lora_targets
from liveavatar_core.weights.lora import merge, open_lora

MODULE = "blocks.2.cross_attn.k"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture
def pairs(demo: DemoFiles) -> dict[str, torch.Tensor]:
    return dict(load_file(demo.lora))


def saved(tmp_path: Path, pairs: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "lora.safetensors"
    save_file(pairs, path)
    return path


def product(pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    """B A of MODULE."""
    up, down = pairs[f"{MODULE}.lora_B.default.weight"], pairs[f"{MODULE}.lora_A.default.weight"]
    return up.float() @ down.float()


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught, open_lora(path) as lora:
        lora.check(DEMO_CONFIG)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_lora_has_448_modules() -> None:
    assert len(lora_targets(LIVE_AVATAR_14B)) == 448


def test_scale_is_half_without_alpha(demo: DemoFiles, pairs) -> None:
    with open_lora(demo.lora) as lora:
        lora.check(DEMO_CONFIG)
        delta = lora.delta(MODULE)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, 0.5 * product(pairs))


def test_alpha_in_the_file_and_the_strength_count(tmp_path: Path, pairs) -> None:
    pairs[f"{MODULE}.alpha"] = torch.tensor(3.0)
    with open_lora(saved(tmp_path, pairs), strength=-0.25) as lora:
        lora.check(DEMO_CONFIG)
        torch.testing.assert_close(lora.delta(MODULE), 3.0 / 4 * -0.25 * product(pairs))


def test_module_without_a_pair_is_left_alone(demo: DemoFiles) -> None:
    with open_lora(demo.lora) as lora:
        assert lora.delta("head.head") is None
        weight = torch.ones(3, 3)
        assert merge(weight, "head.head", [lora]) is weight


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model.", "base_model.model.diffusion_model."])
@pytest.mark.parametrize(
    ("down", "up"), [("lora_A.default", "lora_B.default"), ("lora_A", "lora_B"), ("lora_down", "lora_up")]
)
def test_spellings(tmp_path: Path, pairs, prefix: str, down: str, up: str) -> None:
    def spell(key: str) -> str:
        return prefix + key.replace("lora_A.default", down).replace("lora_B.default", up)

    with open_lora(saved(tmp_path, {spell(key): tensor for key, tensor in pairs.items()})) as lora:
        lora.check(DEMO_CONFIG)
        torch.testing.assert_close(lora.delta(MODULE), 0.5 * product(pairs))


def test_several_loras_add_up_and_are_rounded_once(demo: DemoFiles) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with open_lora(demo.lora, 0.3) as first, open_lora(demo.lora, -0.7) as second:
        merged = merge(weight, MODULE, [first, second])
        want = (weight.float() + first.delta(MODULE) + second.delta(MODULE)).bfloat16()
    assert torch.equal(merged, want)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "lora.safetensors")


def test_truncated_file(demo: DemoFiles, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(demo.lora.read_bytes()[:-1])
    assert "not a complete safetensors file" in refusal(path)


def test_not_a_lora(demo: DemoFiles) -> None:
    assert "is not a LoRA that can be merged" in refusal(demo.vae)


def test_missing_pair(tmp_path: Path, pairs) -> None:
    for part in "AB":
        del pairs[f"audio_injector.injector.1.v.lora_{part}.default.weight"]
    message = refusal(saved(tmp_path, pairs))
    assert "is a LoRA of another model: 47 of this model's 48 modules match" in message
    assert "audio_injector.injector.1.v is missing" in message


def test_half_a_pair(tmp_path: Path, pairs) -> None:
    del pairs[f"{MODULE}.lora_B.default.weight"]
    assert f"{MODULE} is incomplete" in refusal(saved(tmp_path, pairs))


def test_foreign_module(tmp_path: Path, pairs) -> None:
    for part, shape in (("A", (4, 64)), ("B", (64, 4))):
        pairs[f"blocks.4.ffn.0.lora_{part}.default.weight"] = torch.zeros(shape)
    message = refusal(saved(tmp_path, pairs))
    assert "48 of this model's 48 modules match and blocks.4.ffn.0 is not part of it" in message


@pytest.mark.parametrize(("part", "shape"), [("A", (4, 65)), ("B", (63, 4)), ("B", (64, 5)), ("A", (64,))])
def test_shapes_must_fit(tmp_path: Path, pairs, part: str, shape: tuple[int, ...]) -> None:
    pairs[f"{MODULE}.lora_{part}.default.weight"] = torch.zeros(shape)
    assert f"{MODULE} is of shapes" in refusal(saved(tmp_path, pairs))


def test_empty_strength_changes_nothing(demo: DemoFiles) -> None:
    with open_lora(demo.lora, 0.0) as lora:
        assert not lora.delta(MODULE).any()
