"""From checkpoint to model: builds a CausalDiT on meta and fills it tensor by tensor.

Only what a stage needs is read; each tensor is cast, merged and quantised alone on its way to the device, so neither
host nor device ever holds a second copy of the model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from liveavatar_core.config import ModelConfig
from liveavatar_core.errors import WeightsError
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.weights.lora import Lora, merge
from liveavatar_core.weights.quant import Fp8Linear, quantise_linears
from liveavatar_core.weights.reader import TensorInfo, WeightReader

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor; it may raise to cancel."""

_FLOAT32 = ("time_embedding.", "time_projection.", "head.", "casual_audio_encoder.")  # SPEC 2.4, 4.5, 4.6
_NAMED = 3  # names quoted in an error
_DRAWING = {init.kaiming_uniform_, init.uniform_, init.normal_}


class _NoDrawing(TorchFunctionMode):
    """Leaves parameters undrawn. On meta there is nothing to draw, yet normal_ would import seconds of compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _DRAWING:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_dit(config: ModelConfig, layers: range | None = None) -> CausalDiT:
    """The DiT, or its part for `layers`, on the meta device: names and shapes without memory."""
    with torch.device("meta"), _NoDrawing():
        return CausalDiT(config, layers)


def load_dit(
    reader: WeightReader,
    config: ModelConfig,
    *,
    layers: range | None = None,
    loras: Sequence[Lora] = (),
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: bool = False,
    progress: Progress | None = None,
) -> CausalDiT:
    """The DiT, or its part for `layers`, in evaluation mode on `device`.

    Weights have `dtype`, except the few that compute in float32 (time, modulation, head, audio encoder) and, with
    `fp8`, the linears that `quantise_linears` converts. LoRAs are checked against the whole model and merged first.
    Raises WeightsError when the checkpoint lacks names or shapes of this model, or has others.
    """
    for lora in loras:
        lora.check(config)
    _check_names(reader, empty_dit(config))
    model = empty_dit(config, layers)
    needed = list(model.state_dict())
    if fp8:
        quantise_linears(model)
    total = sum(_bytes(reader.infos()[name]) for name in needed)
    done = 0
    for name in needed:
        module, _, part = name.rpartition(".")
        tensor = reader.get(name).to(device, torch.float32 if _keeps_float32(name) else dtype)
        if part == "weight":
            tensor = merge(tensor, module, loras)
        _put(model.get_submodule(module), part, tensor)
        done += _bytes(reader.infos()[name])
        if progress is not None:
            progress(done, total)
    return model.eval().requires_grad_(False)


def _put(module: nn.Module, part: str, tensor: Tensor) -> None:
    if isinstance(module, Fp8Linear) and part == "weight":
        module.store(tensor)
    else:
        setattr(module, part, nn.Parameter(tensor, requires_grad=False))


def _keeps_float32(name: str) -> bool:
    return name.startswith(_FLOAT32) or name.endswith(".modulation")


def _bytes(info: TensorInfo) -> int:
    return info.dtype.itemsize * torch.Size(info.shape).numel()


def _check_names(reader: WeightReader, model: CausalDiT) -> None:
    infos = reader.infos()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in infos]
    unexpected = [name for name in infos if name not in expected]
    wrong = [
        f"{name} {infos[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in infos and infos[name].shape != shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise WeightsError(f"{reader.path} is not this model: {'; '.join(problems)}; use Wan2.2-S2V-14B")
