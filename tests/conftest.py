"""Shared fixtures: the recorded tensors (`--golden DIR`) and the table of errors printed after the run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from liveavatar_core.config import ModelConfig
from liveavatar_core.weights.layout import infer_config

# Tiny models gain nothing from a second thread and lose a lot to it when the machine is busy.
torch.set_num_threads(1)

HERE = Path(__file__).parent
_rows: list[tuple[str, str, float, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(HERE / "golden" / "set_a"), help="directory of recorded tensors")


class Golden:
    """One directory of recorded tensors. `golden("rope")` -> (tensors, manifest)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> tuple[dict[str, torch.Tensor], dict]:
        manifest = json.loads((self.root / f"{name}.json").read_text())
        tensors = load_file(self.root / f"{name}.safetensors")
        for key, entry in manifest["tensors"].items():
            if entry.get("use_as") == "float32":
                tensors[key] = tensors[key].float()
        return tensors, manifest

    @property
    def config(self) -> dict:
        return json.loads((self.root / "config.json").read_text())


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(Path(request.config.getoption("--golden")))


@pytest.fixture(scope="session")
def golden_config(golden: Golden) -> ModelConfig:
    """The recorded model's shape, read the way a checkpoint's is."""
    return infer_config(golden("dit_weights")[0], golden.config)


@pytest.fixture
def agree():
    """agree(file, group, got, want, tolerance): largest relative error, recorded for the table, then judged.

    Relative error is max|got - want| / max|want|, as the recording's own notes define it.
    """

    def judge(file: str, group: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
        assert tuple(got.shape) == tuple(want.shape), (
            f"{file} {group}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        )
        error = (got.double() - want.double()).abs().max().item() / max(want.double().abs().max().item(), 1e-30)
        _rows.append((file, group, error, tolerance))
        assert error <= tolerance, f"{file} {group}: relative error {error:.2e} exceeds {tolerance:.0e}"

    return judge


def pytest_terminal_summary(terminalreporter) -> None:
    if not _rows:
        return
    terminalreporter.section("recorded tensors: largest relative error")
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for file, group, error, tolerance in _rows:
        worst[file, group] = max(worst.get((file, group), (0.0, tolerance)), (error, tolerance))
    for (file, group), (error, tolerance) in sorted(worst.items()):
        terminalreporter.write_line(f"{file:24} {group:34} {error:9.2e}  (allowed {tolerance:.0e})")
