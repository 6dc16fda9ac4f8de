"""Linears with e4m3 weights and activations: weights are quantised once, activations at every call.

Knows linears and numbers, not checkpoints. There are two ways to scale. Ours gives every output channel of a weight
and every token a scale of its own. The original's (SPEC 7.4) has one per tensor, which couples all tokens of a call;
its bytes are reproduced, the cap of the scale at 448 included. The weight's scale tells which of them a linear is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveavatar_core.model.pointwise import FP8, LARGEST_FP8, Activation, Rows, quantise_rows

_KEPT = (  # parts of module names that stay in the model's dtype
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head.head",
    "casual_audio_encoder.encoder.final_linear",
)


def quantise_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values of x's shape, dequantisation factor (1,) float32): x is about values * factor.

    The scale is capped at 448, so a tensor within ±1 uses only part of the fp8 range, as in the original.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).clamp(min=1.0).reshape(1)
    scale = LARGEST_FP8 / largest
    # One element, not 0-dim: a card would round a 0-dim scale to bf16, but not the factor that undoes it. The product
    # is rounded to x's dtype before the cast, as the original's is; the cast rounds whatever exceeds 448 back to it.
    return (x * scale).to(x.dtype).to(FP8), 1 / scale


class Fp8Linear(nn.Module):
    """A linear with an e4m3 weight. Multiplies in fp8 where the card can.

    Where it cannot: by row, the activations stay as they are and only the weights are fp8; on a CPU, and per tensor,
    float32 reproduces what a card with fp8 would do.
    """

    def __init__(
        self, in_features: int, out_features: int, device: torch.device | str | None = None, *, by_row: bool = True
    ) -> None:
        """`by_row`: a scale for each row of weight and activations; else the original's scale per tensor."""
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=FP8, device=device), requires_grad=False
        )
        scales = out_features if by_row else 1
        self.weight_scale = nn.Parameter(torch.ones(scales, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False)

    def store(self, weight: Tensor) -> None:
        """Take over a full precision weight (out, in); the bias is an ordinary parameter."""
        if self._by_row:
            rows = quantise_rows(weight.detach().unsqueeze(0))
            values, scale = rows.values[0], rows.scale.flatten()
        else:
            values, scale = quantise_fp8(weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def _by_row(self) -> bool:
        return self.weight_scale.numel() > 1

    @property
    def takes_rows(self) -> bool:
        """Whether every token gets a scale of its own; whatever makes the input may then quantise it in passing."""
        return self._by_row and (self.weight.device.type == "cpu" or has_fp8(self.weight.device))

    def forward(self, x: Activation, out: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out) in x's dtype, rounded to bf16 on the way as the original's fp8 product is.

        Rows, whose dtype before is unknown, give the dtype of the bias. Into `out`, contiguous, if given.
        """
        if self._by_row and not self.takes_rows:
            y = scaled_linear(x, self.weight, self.weight_scale, self.bias)
            return y if out is None else out.copy_(y)
        dtype = self.bias.dtype if isinstance(x, Rows) else x.dtype
        if self._by_row:
            rows = x if isinstance(x, Rows) else quantise_rows(x)
            shape = rows.values.shape
            values, scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
            weight_scale = self.weight_scale.unsqueeze(0)
        else:
            shape, weight_scale = x.shape, self.weight_scale
            values, scale = quantise_fp8(x.flatten(0, -2))
        if has_fp8(values.device) and not any(size % 16 for size in self.weight.shape):
            direct = out is not None and out.dtype == torch.bfloat16
            y = torch._scaled_mm(
                values,
                self.weight.t(),
                scale_a=scale,
                scale_b=weight_scale,
                bias=self.bias.bfloat16(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
                **({"out": out.view(-1, out.shape[-1])} if direct else {}),
            )
            if direct:
                return out
        else:
            y = dequantised_linear(values, scale, self.weight, self.weight_scale, self.bias).bfloat16()
        y = y.to(dtype).unflatten(0, shape[:-1])
        return y if out is None else out.copy_(y)


def dequantised_linear(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The product of e4m3 values (rows, in) and weight (out, in) in float32: (rows, out) before any rounding."""
    return F.linear(values.float() * scale, weight.float() * weight_scale.unsqueeze(1), bias.float())


def scaled_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """x times an e4m3 weight (out, in) with a scale per output channel, multiplied in x's dtype."""
    return (F.linear(x, weight.to(x.dtype)) * weight_scale + bias).to(x.dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether the card multiplies fp8 matrices: NVIDIA Ada, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantise_linears(model: nn.Module, *, by_row: bool = True) -> list[str]:
    """Replace the linears of the model by Fp8Linear, in place; returns their names.

    Embeddings of text and time, the head and the audio encoder stay, as in the original. Works on meta too, where
    it only decides the layout.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _converts(name)]
    for name in names:
        linear = model.get_submodule(name)
        quantised = Fp8Linear(linear.in_features, linear.out_features, device="meta", by_row=by_row)
        quantised.store(linear.weight)
        quantised.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantised)
    return names


def _converts(name: str) -> bool:
    return not any(part in name for part in _KEPT)
