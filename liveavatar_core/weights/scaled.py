"""fp8 weights that stand beside the factor that undoes their scaling, as ComfyUI's `fp8_scaled` files have them.

Two spellings: `x.scale_weight`, with a marker tensor `scaled_fp8`, and `x.weight_scale`, with a description in the
metadata or in `x.comfy_quant`. Names, dtypes and shapes say enough; the descriptions are not read. Knows no files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liveavatar_core.errors import WeightsError

if TYPE_CHECKING:
    from liveavatar_core.weights.file import TensorInfo

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_FACTORS = (".weight_scale", ".scale_weight")
_UNUSED = (".input_scale", ".scale_input", ".comfy_quant")  # how others scale activations; we measure ours


def is_weight(name: str) -> bool:
    """Whether a stored tensor is the model's own, not a remark on one."""
    return not name.endswith((*_FACTORS, *_UNUSED)) and name != "scaled_fp8"


def find_factors(path: Path, infos: Mapping[str, "TensorInfo"]) -> dict[str, str]:
    """Name of a weight -> name of its factor, of all stored tensors; `path` is for the message.

    Raises WeightsError for weights that are quantised in another way than fp8 with one factor, or one per row.
    """
    factors = {}
    for name in infos:
        if not name.endswith(_FACTORS):
            continue
        weight, shape = name.rpartition(".")[0] + ".weight", infos[name].shape
        info = infos.get(weight)
        if info is None or info.dtype not in FP8_TYPES or torch.Size(shape).numel() not in (1, *info.shape[:1]):
            beside = "no weight" if info is None else f"a weight of {info.dtype} {info.shape}"
            raise WeightsError(
                f"{path} is already quantised ({name}) in a way that cannot be read here: a factor of shape {shape} "
                f"beside {beside}; use the bf16 or the fp8_scaled file"
            )
        factors[weight] = name
    return factors


def dequantise(values: Tensor, factor: Tensor) -> Tensor:
    """fp8 values (out, ...) and their factor, of one element or `out` -> float32 of the values' shape."""
    return values.float() * factor.float().reshape(-1, *[1] * (values.ndim - 1))
