"""Triton kernels of the decoder: what lies between two convolutions, and the convolutions that libraries do badly.

Called by `maps` alone, whose plain functions say what each computes. Sums are float32.
Legend: T frames, H rows, W columns, C channels in, N channels out.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

PAST = tl.constexpr(2)  # frames that a causal convolution sees beside each one
ROWS = 32  # places that one program of `_gather` works on
TILE = 256  # places that one program of `_convolve` works on


@triton.jit(do_not_specialize=("frames", "area", "columns", "pitch", "seen_area"))
def _gather(
    x, bias, skip, gamma, total, seen, past, frames, area, columns, pitch, seen_area,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    known = channel < C
    inside = (place < area)[:, None] & known[None, :]
    at = place[:, None] * C + channel[None, :]
    frame = t * area * C
    h = tl.load(x + frame + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if skip is not None:
        h += tl.load(skip + frame + at, mask=inside, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + frame + at, h.to(x.dtype.element_ty), mask=inside)
    if gamma is not None:
        length = tl.maximum(tl.sqrt(tl.sum(h * h, 1)), 1e-12)
        scale = tl.load(gamma + channel, mask=known, other=0.0).to(tl.float32) * tl.sqrt(C * 1.0)
        h = h / length[:, None] * scale[None, :]
        h = h * tl.sigmoid(h)
    h = h.to(x.dtype.element_ty)
    to = (place // columns * pitch + place % columns)[:, None] * C + channel[None, :]
    if past is None:
        tl.store(seen + t * seen_area * C + to, h, mask=inside)
    else:
        tl.store(seen + (t + PAST) * seen_area * C + to, h, mask=inside)
        if t + PAST >= frames:  # these frames take the places of the two before, which are handed on
            which = t + PAST - frames
            held = past + which * area * C + at
            tl.store(seen + which * seen_area * C + to, tl.load(held, mask=inside), mask=inside)
            tl.store(held, h, mask=inside)


@triton.jit
def _put(
    total, bias, out, t, first, n, rows, columns, pitch, out_frame, out_row, out_column,
    N: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    channel = n + tl.arange(0, WIDTH)
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
    place = first + tl.arange(0, TILE)
    row, column = place // pitch, place % pitch
    to = out + t.to(tl.int64) * out_frame + (row * out_row + column * out_column)[:, None] + channel[None, :]
    inside = ((row < rows) & (column < columns))[:, None] & (channel < N)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("frames", "rows", "columns", "pitch", "up", "left"))
def _convolve(
    x, weight, more_weight, bias, out, frames, rows, columns, pitch, out_frame, out_row, out_column, up, left,
    C: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """A frame is a list of places, each row ending in a column of zeros: every tap is a shift of the whole list.

    What a shift finds outside the list, the tensor descriptor reads as zeros. Widths of products are powers of two and
    the channels often three times one: there are two products side by side, WIDTH and MORE.
    """
    tile = tl.program_id(0)
    t = tile % frames  # neighbours in time run together and find each other's reads in the cache
    first = tile // frames * TILE
    n = tl.program_id(1) * (WIDTH + MORE)
    steps: tl.constexpr = C // DEPTH
    total = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    if MORE:
        rest = tl.zeros((TILE, MORE), dtype=tl.float32)
    for k in range(KT * KH * KW * steps):
        tap = k // steps
        shift = (tap // KW % KH - up) * pitch + tap % KW - left
        a = x.load([t + tap // (KH * KW), first + shift, k % steps * DEPTH]).reshape(TILE, DEPTH)
        total = tl.dot(a, weight.load([n, k * DEPTH]).T, total)
        if MORE:
            rest = tl.dot(a, more_weight.load([n + WIDTH, k * DEPTH]).T, rest)
    _put(total, bias, out, t, first, n, rows, columns, pitch, out_frame, out_row, out_column, N, TILE, WIDTH)
    if MORE:
        n += WIDTH
        _put(rest, bias, out, t, first, n, rows, columns, pitch, out_frame, out_row, out_column, N, TILE, MORE)


def _on(like: Tensor):
    # Triton launches on the current device, wherever its tensors are.
    return nullcontext() if like.device.index == torch.cuda.current_device() else torch.cuda.device_of(like)


def gather(
    x: Tensor, bias: Tensor | None, skip: Tensor | None, gamma: Tensor | None, total: Tensor | None, seen: Tensor,
    past: Tensor | None,
) -> None:  # fmt: skip
    """Fill `seen`: (T + 2, H, W or more, C) with a past of two frames, T being 2 or more; (T, H, W or more, C) without.

    `total` gets the sum itself.
    """
    frames, rows, columns, channels = x.shape
    grid = (triton.cdiv(rows * columns, ROWS), frames)
    with _on(x):
        _gather[grid](
            x, bias, skip, gamma, total, seen, past, frames, rows * columns, columns, seen.shape[2],
            rows * seen.shape[2], C=channels, BLOCK=triton.next_power_of_2(channels), ROWS=ROWS, num_warps=4,
        )  # fmt: skip


def widths(channels: int) -> tuple[int, int] | None:
    """How `convolve` cuts so many channels out: those of two products side by side. None if it does not do them."""
    for width, more in ((128, 0), (128, 64), (64, 32)):
        if channels % (width + more) == 0:
            return width, more
    return (16, 0) if channels <= 16 else None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, up: int, left: int) -> None:
    """x (T + kt - 1, H, W + 1, C), its last column zeros, and weight (N, kt, kh, kw, C) -> out (T, H, W, N).

    C is a multiple of 32, `widths(N)` is not None. `up`, `left`: how far the kernel's first tap lies from the place it
    is for. Only the channels of `out` must be contiguous.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in every Triton that can do the rest

    channels_out, *taps, channels = weight.shape
    frames, rows, columns, _ = out.shape
    pitch, (width, more), depth = x.shape[2], widths(channels_out), 32 if channels % 64 else 64
    places, flat = x.view(len(x), -1, channels), weight.view(channels_out, -1)
    grid = (frames * triton.cdiv(rows * pitch, TILE), triton.cdiv(channels_out, width + more))
    with _on(x):
        _convolve[grid](
            TensorDescriptor(places, places.shape, places.stride(), [1, TILE, depth]),
            TensorDescriptor(flat, flat.shape, flat.stride(), [width, depth]),
            TensorDescriptor(flat, flat.shape, flat.stride(), [more, depth]) if more else None,
            bias, out, frames, rows, columns, pitch, *out.stride()[:3], up, left,
            C=channels, N=channels_out, KT=taps[0], KH=taps[1], KW=taps[2],
            TILE=TILE, DEPTH=depth, WIDTH=width, MORE=more, num_warps=8, num_stages=3 if width + more > 128 else 4,
        )  # fmt: skip
