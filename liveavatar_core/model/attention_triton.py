"""Attention for any GPU that Triton knows, queries and keys in int8 or as the values are. One program is 128 queries of
one head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from liveavatar_core.model.kernels import launch
from liveavatar_core.model.pointwise import Heads

ROWS, KEYS = 128, 64  # queries of a program, keys of a step


@triton.jit(do_not_specialize=["rows", "keys"])
def _attention(
    q, k, v, q_scale, k_scale, scale_key, scale_head, out, redo, rows, keys, heads, HEAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    if redo is not None:
        halves = redo + 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        if tl.load(halves) + tl.load(halves + 1) == 0:
            return
    head, width = tl.program_id(1), heads * HEAD
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), head * HEAD + tl.arange(0, HEAD)
    inside = row < rows
    q_MK = tl.load(q + row[:, None] * width + channel[None, :], mask=inside[:, None], other=0)
    r = tl.full((ROWS,), 1.4426950408889634 / HEAD**0.5, tl.float32)  # base 2 from here on
    if q_scale is not None:
        r *= tl.load(q_scale + row * heads + head, mask=inside, other=1.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, HEAD), tl.float32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        bias = tl.where(key < keys, 0.0, float("-inf"))
        key = tl.minimum(key, keys - 1)
        x = tl.dot(q_MK, tl.load(k + key[None, :] * width + channel[:, None])).to(tl.float32)
        if k_scale is not None:
            x *= tl.load(k_scale + head * scale_head + key * scale_key)[None, :]
        x += bias[None, :]
        larger = tl.maximum(largest, tl.max(x, 1) * r)
        p = tl.exp2(x * r[:, None] - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        v_NK = tl.load(v + key[:, None] * width + channel[None, :])
        o = tl.dot(p.to(v_NK.dtype), v_NK, o * shrink[:, None])
        largest = larger
    place = row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(out + place, (o / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


def attend(
    q: Tensor | Heads, k: Tensor | Heads, v_BSHK: Tensor, out: Tensor | None = None, redo: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in the values' dtype, of 16 bits. B is 1, K a power of two, rows are contiguous.

    With `redo`, two numbers for every 128 queries of each head, only what one of them marks, into `out`.
    """
    q_scale = k_scale = None
    strides = (0, 0)
    if isinstance(q, Heads):
        q, k, q_scale, k_scale, strides = q.values, k.values, q.scale, k.scale, k.scale.stride()[1:]
    out = torch.empty(q.shape, device=v_BSHK.device, dtype=v_BSHK.dtype) if out is None else out
    _, count, heads, width = out.shape
    launch(
        _attention, (triton.cdiv(count, ROWS), heads), out, q, k, v_BSHK, q_scale, k_scale, *strides, out, redo, count,
        v_BSHK.shape[1], heads, warps=8, HEAD=width, ROWS=ROWS, KEYS=KEYS,
    )  # fmt: skip
    return out
