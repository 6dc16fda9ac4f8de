"""LoRA files: read, checked against the whole model, and turned into weight differences one module at a time by peft.

Decision: a LoRA that does not fit in full is an error. The original loads non-strictly, so a file with unexpected names
silently leaves the base model, which makes noise in four steps (SPEC 7.3).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from liveavatar_core.config import ModelConfig
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.layout import lora_targets
from liveavatar_core.weights.reader import open_file

# The published file carries no alpha; its training settings say alpha 64 for rank 128.
_ALPHA_PER_RANK = 0.5
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:diffusion_model\.)?(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(?:\.default)?(?:\.weight)?"
)
_PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
_ADAPTER = "default"


class Lora:
    """One LoRA file and its strength; a context manager. Tensors are read when their module is asked for."""

    def __init__(self, path: Path, strength: float) -> None:
        self.path, self.strength = path, strength
        self._reader = open_file(path)
        self._keys: dict[str, dict[str, str]] = {}  # module -> down, up, alpha -> name in the file
        for key in self._reader.infos():
            match = _KEY.fullmatch(key)
            if match is None:
                self.close()
                raise WeightsError(f"{path} is not a LoRA that can be merged: {key} is neither A, B nor alpha")
            self._keys.setdefault(match["module"], {})[_PARTS[match["part"]]] = key

    def check(self, config: ModelConfig) -> None:
        """Raise WeightsError unless the file has a pair of the right shape for every target and nothing else."""
        targets = lora_targets(config)
        problems = {module: problem for module in targets if (problem := self._misfit(module, targets[module]))}
        matched = len(targets) - len(problems)
        problems |= {module: "not part of it" for module in self._keys if module not in targets}
        if problems:
            module, problem = next(iter(problems.items()))
            raise WeightsError(
                f"{self.path} is a LoRA of another model: {matched} of this model's {len(targets)} modules match and "
                f"{module} is {problem}; use the Live Avatar LoRA"
            )

    def _misfit(self, module: str, weight: tuple[int, int]) -> str | None:
        if module not in self._keys:
            return "missing"
        parts, infos = self._keys[module], self._reader.infos()
        if not {"down", "up"} <= parts.keys():
            return "incomplete"
        down, up = infos[parts["down"]].shape, infos[parts["up"]].shape
        if len(down) != 2 or down[1] != weight[1] or up != (weight[0], down[0]):
            return f"of shapes {down} and {up} for a weight of {weight}"
        return None

    def delta(self, module: str, device: torch.device | str = "cpu") -> Tensor | None:
        """What this LoRA adds to the weight of `module`: (out, in) float32; None where it changes nothing."""
        parts = self._keys.get(module)
        if parts is None:
            return None
        down = self._reader.get(parts["down"]).to(device, torch.float32)
        up = self._reader.get(parts["up"]).to(device, torch.float32)
        rank = down.shape[0]
        alpha = self._reader.get(parts["alpha"]).item() if "alpha" in parts else _ALPHA_PER_RANK * rank
        return _peft_delta(down, up, alpha * self.strength)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "Lora":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_lora(path: Path | str, strength: float = 1.0) -> Lora:
    """Open a LoRA file; call `check` before use. Raises WeightsError when missing, damaged or not a LoRA."""
    return Lora(Path(path), strength)


def merge(weight: Tensor, module: str, loras: Sequence[Lora]) -> Tensor:
    """W + sum of the deltas, added in float32 in the order given and rounded once to the dtype of `weight`."""
    deltas = [delta for lora in loras if (delta := lora.delta(module, weight.device)) is not None]
    if not deltas:
        return weight
    merged = weight.float()
    for delta in deltas:
        merged = merged + delta
    return merged.to(weight.dtype)


def _peft_delta(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """alpha / rank * up @ down by peft's own layer, built around a base weight that takes no memory."""
    # peft pulls in all of transformers: seconds that only a merge should cost.
    from peft import LoraConfig, inject_adapter_in_model

    rank, in_features = down.shape
    holder = nn.Module()
    holder.linear = nn.Linear(in_features, up.shape[0], bias=False, device="meta")
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["linear"])
    inject_adapter_in_model(settings, holder, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    holder.linear.lora_A[_ADAPTER].weight = nn.Parameter(down, requires_grad=False)
    holder.linear.lora_B[_ADAPTER].weight = nn.Parameter(up, requires_grad=False)
    return holder.linear.get_delta_weight(_ADAPTER)
