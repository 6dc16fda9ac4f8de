"""Everything between two matrix products: norms, modulation, residuals, rotation, quantised rows and heads.

Plain PyTorch says what is computed. On a GPU with Triton each function is one kernel, which reads and writes memory
once; where Triton is missing or fails, the plain form runs everywhere.
Legend: B batch (1) or latent frames, T tokens, D width, H heads, K head width.
"""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

EPS = 1e-6
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Activations in e4m3 with a scale for every token: x is about values * scale."""

    values: Tensor  # (B, T, D) e4m3
    scale: Tensor  # (B, T, 1) float32


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys or values in 8 bits with a scale for every token and head: x is about values * scale.

    e4m3 keeps a head as it is. int8 has its channels turned by `hadamard`, which spreads outliers over all of them and
    leaves the product of two turned heads what it was.
    """

    values: Tensor  # (B, T, H, K) e4m3 or int8
    scale: Tensor  # (B, T, H) float32

    def __getitem__(self, index) -> "Heads":
        return Heads(self.values[index], self.scale[index])


Activation = Tensor | Rows


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels if they work on this device."""
    if device.type != "cuda":
        return None
    try:
        from liveavatar_core.model import kernels

        x = torch.ones(1, 1, 16, device=device)
        kernels.gated(x, x, x[0, 0], x.dtype)
    except Exception as error:  # no Triton, no compiler, an old card: the plain form needs none of them
        log.info("fused kernels are off on %s: %s", device, error)
        return None
    return kernels


def layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm over the last axis without affine; float32 out."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def quantise_rows(x_BTD: Tensor) -> Rows:
    if kernels := _kernels(x_BTD.device):
        return Rows(*kernels.quantise(x_BTD, gelu=False))
    largest = torch.linalg.vector_norm(x_BTD, torch.inf, -1, keepdim=True, dtype=torch.float32).clamp(min=1e-12)
    return Rows((x_BTD.float() * (LARGEST_FP8 / largest)).to(FP8), largest / LARGEST_FP8)


def gelu(x_BTD: Tensor, *, rows: bool) -> Activation:
    """GELU in its tanh form."""
    if rows and (kernels := _kernels(x_BTD.device)):
        return Rows(*kernels.quantise(x_BTD, gelu=True))
    x_BTD = F.gelu(x_BTD, approximate="tanh")
    return quantise_rows(x_BTD) if rows else x_BTD


def norm(
    x_BTD: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = EPS,
    dtype: torch.dtype | None = None,
    rounded: bool = False,
    around_one: bool = False,
    rows: bool = False,
) -> Activation:
    """LayerNorm(x) * weight + bias in x's dtype, or `dtype`. `rounded`: the norm itself is rounded first.

    Weight and bias are (D,) or (B, 1, D). `around_one`: 1 + weight in the weight's place.
    """
    dtype = dtype or x_BTD.dtype
    if kernels := _kernels(x_BTD.device):
        _, out, scale = kernels.norm(
            x_BTD, None, None, weight, bias, eps=eps, dtype=dtype, round_sum=False, round_norm=rounded,
            around_one=around_one, rows=rows,
        )  # fmt: skip
        return out if scale is None else Rows(out, scale)
    h_BTD = layer_norm(x_BTD, eps)
    h_BTD = h_BTD.to(dtype).float() if rounded else h_BTD
    weight = 1 + weight.float() if around_one else weight.float()
    h_BTD = (h_BTD * weight + bias.float()).to(dtype)
    return quantise_rows(h_BTD) if rows else h_BTD


def add_norm(
    x_BTD: Tensor,
    y_BTD: Tensor,
    gate_D: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    dtype: torch.dtype,
    rounded: bool,
    around_one: bool = False,
    rows: bool,
) -> tuple[Tensor, Activation]:
    """(x + y * gate in float32, its norm as above). `rounded`: the norm sees the sum rounded to `dtype`."""
    if kernels := _kernels(x_BTD.device):
        total, out, scale = kernels.norm(
            x_BTD, y_BTD, gate_D, weight_D, bias_D, eps=EPS, dtype=dtype, round_sum=rounded, round_norm=False,
            around_one=around_one, rows=rows,
        )  # fmt: skip
        return total, out if scale is None else Rows(out, scale)
    total_BTD = x_BTD.float() + (y_BTD if gate_D is None else y_BTD * gate_D)
    seen_BTD = total_BTD.to(dtype) if rounded else total_BTD
    return total_BTD, norm(seen_BTD, weight_D, bias_D, dtype=dtype, around_one=around_one, rows=rows)


def gated(x_BTD: Tensor, y_BTD: Tensor, gate_D: Tensor, dtype: torch.dtype) -> Tensor:
    """x + y * gate, added in float32."""
    if kernels := _kernels(x_BTD.device):
        return kernels.gated(x_BTD, y_BTD, gate_D, dtype)
    return (x_BTD + y_BTD * gate_D).to(dtype)


def rms_norm(x_BTD: Tensor, weight_D: Tensor) -> Tensor:
    if kernels := _kernels(x_BTD.device):
        return kernels.heads(x_BTD, weight_D, None, torch.empty_like(x_BTD.contiguous()), 1, EPS)
    normed = x_BTD.float() * torch.rsqrt(x_BTD.float().square().mean(-1, keepdim=True) + EPS)
    return normed.to(x_BTD.dtype) * weight_D


def rotate(x_BTHK: Tensor, factors: Tensor, *, norm_D: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Rotate the channel pairs of every head by `factors` (T, K/2, 2), float32 inside; into `out` if given. B is 1; the
    plain form takes any, and (B, T, K/2, 2).

    With the weight `norm_D` there is an RMS norm, over all heads together, before.
    """
    if kernels := _kernels(x_BTHK.device):
        out = torch.empty_like(x_BTHK.contiguous()) if out is None else out
        return kernels.heads(x_BTHK, norm_D, factors, out, x_BTHK.shape[-1], EPS)
    if norm_D is not None:
        x_BTHK = rms_norm(x_BTHK.flatten(2), norm_D).view_as(x_BTHK)
    a, b = x_BTHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = factors.unsqueeze(-3).unbind(-1)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x_BTHK.dtype)
    return rotated if out is None else out.copy_(rotated)


@cache
def hadamard(width: int, device: torch.device) -> Tensor:
    """(K, K) of 1 and -1 in bfloat16, its own inverse but for a factor: one block if K is a power of two, else several
    of the largest power that divides K, the rest 0."""
    block, matrix = width & -width, torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return torch.kron(torch.eye(width // block), matrix).to(device, torch.bfloat16)


def _head_kernels(device: torch.device, kind: torch.dtype) -> ModuleType | None:
    if kind == FP8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return None  # Triton knows e4m3 from there on; torch converts it anywhere
    return _kernels(device)


def quantise_heads(
    x_BTHK: Tensor,
    factors: Tensor | None = None,
    *,
    norm_D: Tensor | None = None,
    kind: torch.dtype = torch.int8,
    out: Heads | None = None,
) -> Heads:
    """Heads in `kind`, normed and rotated before as in `rotate` if there are factors; into `out` if given. B is 1."""
    width = x_BTHK.shape[-1]
    if out is None:
        out = Heads(torch.empty_like(x_BTHK, dtype=kind), x_BTHK.new_empty(x_BTHK.shape[:-1], dtype=torch.float32))
    turned = out.values.dtype == torch.int8
    turn_KK = hadamard(width, x_BTHK.device) if turned else None
    unit = (width & -width) ** -0.5 if turned else 1.0
    # Triton knows blocks of powers of two, and products from 16 on.
    if (kernels := _head_kernels(x_BTHK.device, out.values.dtype)) and width & -width == width >= 16:
        kernels.quantise_heads(x_BTHK, norm_D, factors, turn_KK, out.values, out.scale, unit, EPS)
        return out
    if factors is not None:
        x_BTHK = rotate(x_BTHK, factors, norm_D=norm_D)
    x_BTHK = x_BTHK.to(turn_KK.dtype).float() @ turn_KK.float() if turned else x_BTHK.float()
    largest = x_BTHK.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    limit = 127.0 if turned else LARGEST_FP8
    x_BTHK = x_BTHK * (limit / largest)
    out.values.copy_(x_BTHK.round() if turned else x_BTHK)
    out.scale.copy_(largest.squeeze(-1) * (unit / limit))
    return out


def dequantise_heads(heads: Heads, dtype: torch.dtype) -> Tensor:
    """values * scale, (B, T, H, K); int8 heads stay turned."""
    if kernels := _head_kernels(heads.values.device, heads.values.dtype):
        return kernels.dequantise_heads(heads.values, heads.scale, dtype)
    return (heads.values.float() * heads.scale.unsqueeze(-1)).to(dtype)
