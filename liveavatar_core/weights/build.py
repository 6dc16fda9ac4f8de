"""From checkpoint to model: builds a CausalDiT on meta and fills it tensor by tensor.

Only what a stage needs is read; each tensor is cast, merged and quantised alone on its way to the device, so neither
host nor device ever holds a second copy of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from liveavatar_core.config import ModelConfig
from liveavatar_core.errors import WeightsError
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.model.hosted import HostedLayers
from liveavatar_core.weights.layout import lora_targets
from liveavatar_core.weights.lora import Lora, merge
from liveavatar_core.weights.quant import Fp8Linear, quantise_linears
from liveavatar_core.weights.reader import WeightReader

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


def work_dtype(precision: str, device: str) -> torch.dtype:
    """Of activations, caches and unquantised weights; `precision` as in RuntimeSpec."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if precision == "fp32" or (precision == "auto" and on_cpu) else torch.bfloat16


def planned_dit(config: ModelConfig, layers: range | None = None, *, dtype: torch.dtype, fp8: bool) -> CausalDiT:
    """The DiT, or its part for `layers`, on the meta device, every tensor in the dtype it will have once loaded."""
    model = empty_dit(config, layers)
    if fp8:
        quantise_linears(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not _keeps_float32(name):
            parameter.data = parameter.data.to(dtype)
    return model


def load_dit(
    reader: WeightReader,
    config: ModelConfig,
    *,
    layers: range | None = None,
    loras: Sequence[Lora] = (),
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: bool = False,
    hosted: Sequence[int] = (),
    progress: Progress | None = None,
) -> CausalDiT:
    """The DiT, or its part for `layers`, in evaluation mode on `device`.

    Weights have `dtype`, except the few that compute in float32 (time, modulation, head, audio encoder) and, with
    `fp8`, the linears that `quantise_linears` converts. LoRAs are checked against the whole model and merged first.
    The weights of the layers `hosted` stay in host memory. Raises WeightsError when the checkpoint lacks names or
    shapes of this model, or has others, and PlanError when the host has no memory for them.
    """
    model = planned_dit(config, layers, dtype=dtype, fp8=fp8)
    if hosted:
        model.hosted = HostedLayers(model, config, hosted, torch.device(device))
    for name, tensor in prepared(reader, model, loras=loras, device=device, progress=progress):
        if hosted and name in model.hosted:
            tensor = model.hosted.store(name, tensor)
        module, _, part = name.rpartition(".")
        setattr(model.get_submodule(module), part, nn.Parameter(tensor, requires_grad=False))
    return model.eval().requires_grad_(False)


def prepared(
    reader: WeightReader,
    model: CausalDiT,
    *,
    loras: Sequence[Lora] = (),
    device: torch.device | str,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a `planned_dit` by its name there: read, merged, cast and quantised on `device`, one at a time.

    Weights that are stored in fp8 keep their bytes and factors. Where a LoRA changes one, the numbers it stands for
    are rounded to the model's dtype, merged and quantised again, like any other weight. Raises WeightsError as
    `load_dit` does, before anything is read.
    """
    if reader.record is not None:
        reader.record.check(reader.path, loras, _precision(model))
    for lora in loras:
        lora.check(model.config)
    _check_names(reader, empty_dit(model.config))
    infos = reader.infos()
    needed = list(empty_dit(model.config, model.layers).state_dict())
    total = sum(infos[name].nbytes for name in needed)
    done = 0
    merged = lora_targets(model.config) if loras else {}
    for name in needed:
        module, _, part = name.rpartition(".")
        owner = model.get_submodule(module)
        if isinstance(owner, Fp8Linear) and part == "weight":
            kept = None if module in merged else _kept(reader, name, owner)
            if kept is None:
                # The bias has the dtype that the weight would have, were it not quantised.
                kept = _quantised(owner, merge(reader.get(name, device).to(owner.bias.dtype), module, loras))
            yield from ((f"{module}.{key}", tensor.to(device)) for key, tensor in kept.items())
        else:
            tensor = reader.get(name, device).to(getattr(owner, part).dtype)
            yield name, merge(tensor, module, loras) if part == "weight" else tensor
        done += infos[name].nbytes
        if progress is not None:
            progress(done, total)


def _precision(model: CausalDiT) -> str:
    """As in RuntimeSpec."""
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        return "fp8"
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype]


def _kept(reader: WeightReader, name: str, linear: Fp8Linear) -> dict[str, Tensor] | None:
    """A stored fp8 weight as this linear keeps it, without a second rounding; None if it is not stored so."""
    stored = reader.fp8(name)
    if stored is None or stored[1].numel() not in (1, linear.weight_scale.numel()):
        return None
    values, factor = stored
    return {"weight": values, "weight_scale": factor.expand(linear.weight_scale.shape).contiguous()}


def _quantised(linear: Fp8Linear, weight: Tensor) -> dict[str, Tensor]:
    """What a linear of this kind keeps of a weight (out, in): all its tensors but the bias."""
    filled = deepcopy(linear)  # on meta: a layout, no numbers
    filled.store(weight)
    return {key: tensor for key, tensor in filled.state_dict().items() if key != "bias"}


def _keeps_float32(name: str) -> bool:
    return name.startswith(_FLOAT32) or name.endswith((".modulation", ".weight_scale"))


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
