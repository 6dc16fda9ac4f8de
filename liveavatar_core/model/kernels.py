"""Triton kernels for everything between two matrix products. One program is one row (one token); float32 inside.

Called by `pointwise` alone, whose plain functions say what each computes. Rows are contiguous; where a result is
rounded on the way, it is rounded here too, so that both differ only in the order of sums.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_row(out, row_scale, x, row, column, inside, width, ROWS: tl.constexpr):
    """Write a row, quantised by its own largest value if ROWS."""
    if ROWS:
        largest = tl.maximum(tl.max(tl.abs(x), 0), 1e-12)
        x = x * (448.0 / largest)
        tl.store(row_scale + row, largest / 448.0)
    tl.store(out + row * width + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm(
    x, y, gate, weight, bias, total, out, row_scale, width, group, weight_stride, bias_stride, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, ROUND_SUM: tl.constexpr, ROUND_NORM: tl.constexpr,
    AROUND_ONE: tl.constexpr, ROWS: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            added = added * tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        h = h + added
        tl.store(total + row * width + column, h, mask=inside)
    if ROUND_SUM:
        h = h.to(ROUNDED).to(tl.float32)
    h = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    if ROUND_NORM:
        h = h.to(ROUNDED).to(tl.float32)
    w = tl.load(weight + row // group * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
    if AROUND_ONE:
        w = 1 + w
    b = tl.load(bias + row // group * bias_stride + column, mask=inside, other=0.0).to(tl.float32)
    h = (h * w + b).to(ROUNDED).to(tl.float32)
    _store_row(out, row_scale, h, row, column, inside, width, ROWS)


@triton.jit
def _gated(x, y, gate, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    g = tl.load(gate + column, mask=inside).to(tl.float32)
    h = tl.load(x + place, mask=inside).to(tl.float32) + tl.load(y + place, mask=inside).to(tl.float32) * g
    tl.store(out + place, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_row(
    x, weight, factors, row, width, head_dim, eps, NORM: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr
):
    """A row normed over all its heads, their pairs of channels rotated."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * width + column, mask=inside, other=0.0)
    if NORM:
        f = h.to(tl.float32)
        f = (f * tl.rsqrt(tl.sum(f * f, 0) / width + eps)).to(h.dtype).to(tl.float32)
        h = (f * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)).to(h.dtype)
    if ROTATE:
        a, b = tl.split(tl.reshape(h.to(tl.float32), (BLOCK // 2, 2)))
        table = tl.load(factors + row * head_dim + column % head_dim)
        cos, sin = tl.split(tl.reshape(table, (BLOCK // 2, 2)))
        h = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK,))
    return h


@triton.jit
def _heads(
    x, weight, factors, out, width, head_dim, eps, NORM: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    h = _head_row(x, weight, factors, row, width, head_dim, eps, NORM, ROTATE, BLOCK)
    tl.store(out + row * width + column, h.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _quantise(x, out, row_scale, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * width + column, mask=inside, other=0.0)
    f = h.to(tl.float32)
    if GELU:
        # tanh form: x (1 + tanh u) / 2 = x sigmoid(2 u)
        f = f * tl.sigmoid(1.5957691216057308 * (f + 0.044715 * f * f * f))
        f = f.to(h.dtype).to(tl.float32)
    _store_row(out, row_scale, f, row, column, inside, width, True)


@triton.jit
def _quantise_heads(
    x, weight, factors, turn, out, scale, width, scale_row, scale_head, unit, eps, NORM: tl.constexpr,
    ROTATE: tl.constexpr, TURN: tl.constexpr, LARGEST: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = _head_row(x, weight, factors, row, width, HEAD, eps, NORM, ROTATE, HEADS * HEAD).to(x.dtype.element_ty)
    h = tl.reshape(h, (HEADS, HEAD))
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HEAD)[None, :]
    if TURN:
        h = tl.dot(h.to(tl.bfloat16), tl.load(turn + tl.arange(0, HEAD)[:, None] * HEAD + channel))
    h = h.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(h), 1, keep_dims=True), 1e-12)
    h = h * (LARGEST / largest)
    if TURN:
        h = (h + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23: rounds, and the low byte is the number
    inside = head * HEAD < width
    tl.store(scale + row * scale_row + head * scale_head, largest * (unit / LARGEST), mask=inside)
    tl.store(out + row * width + head * HEAD + channel, h.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantise_heads(x, scale, out, width, scale_row, scale_head, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    h = h * tl.load(scale + row * scale_row + column // HEAD * scale_head, mask=inside, other=0.0)
    tl.store(out + row * width + column, h.to(out.dtype.element_ty), mask=inside)


def launch(kernel, grid: tuple[int, ...], like: Tensor, *args, warps: int, **flags) -> None:
    """On the device of `like`: Triton launches on the current one, wherever its tensors are."""
    with nullcontext() if like.device.index == torch.cuda.current_device() else torch.cuda.device_of(like):
        kernel[grid](*args, **flags, num_warps=warps)


def _row(width: int) -> tuple[int, int]:
    """Block and warps for one row: some 32 elements a thread."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(4, block // 1024))


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float, dtype: torch.dtype,
    round_sum: bool, round_norm: bool, around_one: bool, rows: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(x + y * gate in float32 if there is a y, the normed rows, their scales if `rows`)."""
    x, width = x.contiguous(), x.shape[-1]
    count = x.numel() // width
    groups = weight.numel() // width
    total = None if y is None else torch.empty_like(x, dtype=torch.float32)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn if rows else dtype)
    row_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if rows else None
    block, warps = _row(width)
    stride = weight.stride(0) if groups > 1 else 0
    bias_stride = bias.stride(0) if groups > 1 else 0
    launch(
        _norm, (count,), x, x, None if y is None else y.contiguous(), gate, weight, bias, total, out,
        row_scale, width, count // groups, stride, bias_stride, eps, warps=warps, ADD=y is not None,
        GATE=gate is not None, ROUND_SUM=round_sum, ROUND_NORM=round_norm, AROUND_ONE=around_one, ROWS=rows,
        ROUNDED=_TRITON[dtype], BLOCK=block,
    )  # fmt: skip
    return total, out, row_scale


def gated(x: Tensor, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    grid = (x.numel() // width, triton.cdiv(width, 1024))
    launch(_gated, grid, x, x, y.contiguous(), gate, out, width, warps=4, BLOCK=1024)
    return out


def heads(x: Tensor, weight: Tensor | None, factors: Tensor | None, out: Tensor, head_dim: int, eps: float) -> Tensor:
    """RMS norm over whole rows and rotation of each head's pairs, either or both, into `out` (contiguous rows)."""
    width = out.numel() // (out.shape[0] * out.shape[1])
    block, warps = _row(width)
    launch(
        _heads, (out.shape[0] * out.shape[1],), x, x.contiguous(), weight, factors, out, width, head_dim, eps,
        warps=warps, NORM=weight is not None, ROTATE=factors is not None, BLOCK=block,
    )  # fmt: skip
    return out


def quantise(x: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    """(e4m3 values, scale of each row), of gelu(x) if asked."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    row_scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block, warps = _row(width)
    launch(_quantise, (x.numel() // width,), x, x, out, row_scale, width, warps=warps, GELU=gelu, BLOCK=block)
    return out, row_scale


def quantise_heads(
    x: Tensor, weight: Tensor | None, factors: Tensor | None, turn: Tensor | None, out: Tensor, scale: Tensor,
    unit: float, eps: float,
) -> None:  # fmt: skip
    """As `heads`, then quantised into `out` (contiguous rows) and `scale`; int8 heads turned before by `turn`."""
    count, width, head_dim = out.shape[1], out.shape[2] * out.shape[3], out.shape[3]
    block = max(16 * head_dim, triton.next_power_of_2(width))
    launch(
        _quantise_heads, (count,), x, x.contiguous(), weight, factors, turn, out, scale, width, *scale.stride()[1:],
        unit, eps, warps=4, NORM=weight is not None, ROTATE=factors is not None, TURN=turn is not None,
        LARGEST=448.0 if turn is None else 127.0, HEADS=block // head_dim, HEAD=head_dim,
    )  # fmt: skip


def dequantise_heads(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale of each head; rows are contiguous."""
    out = torch.empty_like(x, dtype=dtype)
    width = out.shape[2] * out.shape[3]
    block, warps = _row(width)
    launch(
        _dequantise_heads, (x.shape[1],), x, x, scale, out, width, *scale.stride()[1:], warps=warps,
        HEAD=x.shape[3], BLOCK=block,
    )  # fmt: skip
    return out
