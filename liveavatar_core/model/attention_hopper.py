"""Attention for Hopper GPUs, in Gluon: queries and keys in int8, values in bfloat16, sums in float32.

One program is one multiprocessor. It takes tile after tile of 128 queries of one head; one of its warps loads and two
groups of four attend, 64 queries each. A group starts a product of queries and keys, then the product of the weights
before with their values, and weighs the one while the other runs; the two groups fill each other's gaps.

A query's logits are taken relative to its largest one in the first tile of keys, not to the largest of all: no sum has
to be corrected on the way. Only logits some 69 above that, weights of e^69, are too much for float32. Tiles that come
near it are marked, and done once more by a kernel that corrects.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from liveavatar_core.model import attention_triton
from liveavatar_core.model.kernels import launch
from liveavatar_core.model.pointwise import Heads

HEAD = 128  # the one head width
GROUPS, ROWS = 2, 64  # groups of warps, queries of each
KEYS = 128  # of one tile
STAGES = 4  # tiles of keys and values on their way
_KINDS = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16}


@gluon.jit
def _load(sources, shared, ready, empty, keys, row_tiles, tiles):
    """Fill shared memory: every tile's queries, and its keys and values from the last, ragged tile of keys down."""
    q, k, v, k_scale, scale_head = sources
    q_at, k_at, v_at, c_at = shared
    q_ready, k_ready, v_ready = ready
    q_empty, k_empty, v_empty = empty
    GROUPS: gl.constexpr = q_at.shape[0]
    ROWS: gl.constexpr = q_at.shape[1]
    HEAD: gl.constexpr = q_at.shape[2]
    STAGES: gl.constexpr = k_at.shape[0]
    KEYS: gl.constexpr = k_at.shape[1]
    each = gl.arange(0, KEYS, gl.BlockedLayout([1], [32], [1], [0]))
    turn = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // row_tiles
        row = tile % row_tiles * (GROUPS * ROWS)
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(group), turn & 1 ^ 1)
            mbarrier.expect(q_ready.index(group), ROWS * HEAD)
            tma.async_copy_global_to_shared(
                q, [row + group * ROWS, head * HEAD], q_ready.index(group), q_at.index(group)
            )
        start = gl.cdiv(keys, KEYS) * KEYS
        while start > 0:
            start -= KEYS
            stage = count % STAGES
            used = count // STAGES & 1 ^ 1
            mbarrier.wait(k_empty.index(stage), used)
            mbarrier.expect(k_ready.index(stage), KEYS * HEAD)
            tma.async_copy_global_to_shared(k, [start, head * HEAD], k_ready.index(stage), k_at.index(stage))
            scales = k_scale + head * scale_head + start + each
            async_copy.async_copy_global_to_shared(c_at.index(stage), scales, mask=start + each < keys)
            async_copy.mbarrier_arrive(k_ready.index(stage), increment_count=False)
            mbarrier.wait(v_empty.index(stage), used)
            mbarrier.expect(v_ready.index(stage), KEYS * HEAD * 2)
            tma.async_copy_global_to_shared(v, [start, head * HEAD], v_ready.index(stage), v_at.index(stage))
            count += 1
        turn += 1


@gluon.jit
def _logits(s, c_at):
    """Products of queries and keys, up to the queries' scale."""
    return s.to(gl.float32) * c_at.load(gl.SliceLayout(0, s.type.layout))[None, :]


@gluon.jit
def _attend(group: gl.constexpr, shared, ready, empty, given):
    q_at, k_at, v_at, c_at = shared
    q_ready, k_ready, v_ready = ready
    q_empty, k_empty, v_empty = empty
    q_scale, out, redo, rows, keys, heads, row_tiles, tiles = given
    GROUPS: gl.constexpr = q_at.shape[0]
    ROWS: gl.constexpr = q_at.shape[1]
    HEAD: gl.constexpr = q_at.shape[2]
    STAGES: gl.constexpr = k_at.shape[0]
    KEYS: gl.constexpr = k_at.shape[1]
    UNIT: gl.constexpr = 1.4426950408889634 / HEAD**0.5  # base 2 from here on
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    none = gl.zeros([ROWS, KEYS], gl.int32, scores)
    blocks = gl.cdiv(keys, KEYS)
    turn = 0
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        head = tile // row_tiles
        first = tile % row_tiles * (GROUPS * ROWS) + group * ROWS
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        r = UNIT * gl.load(q_scale + row * heads + head, mask=row < rows, other=1.0)
        mbarrier.wait(q_ready.index(group), turn & 1)

        # The ragged tile goes first, so that the others need no mask.
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
        s = warpgroup_mma(q_at.index(group), k_at.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        x = _logits(s, c_at.index(stage))
        mbarrier.arrive(k_empty.index(stage))
        key = (blocks - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, scores))
        x = gl.where((key < keys)[None, :], x, float("-inf"))
        shift = gl.max(x, 1) * r
        p = gl.exp2(x * r[:, None] - shift[:, None])
        total = gl.sum(p, 1)
        p = gl.convert_layout(p.to(v_at.dtype), weights)
        o = gl.zeros([ROWS, HEAD], gl.float32, sums)

        for _ in range(1, blocks):
            past = stage
            past_turn = count // STAGES & 1
            count += 1
            stage = count % STAGES
            mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
            s = warpgroup_mma(q_at.index(group), k_at.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(past), past_turn)
            o = warpgroup_mma(p, v_at.index(past), o, is_async=True)
            s = warpgroup_mma_wait(1, [s])
            x = _logits(s, c_at.index(stage))
            mbarrier.arrive(k_empty.index(stage))
            w = gl.exp2(x * r[:, None] - shift[:, None])
            total += gl.sum(w, 1)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(v_empty.index(past))
            p = gl.convert_layout(w.to(v_at.dtype), weights)

        mbarrier.arrive(q_empty.index(group))
        mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
        o = warpgroup_mma_wait(0, [warpgroup_mma(p, v_at.index(stage), o, is_async=True)])
        mbarrier.arrive(v_empty.index(stage))
        gl.store(redo + tile * GROUPS + group, (gl.max(total, 0) > 2.0**100).to(gl.int32))
        o = o / gl.convert_layout(total, gl.SliceLayout(1, sums))[:, None]
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, sums))
        channel = head * HEAD + gl.arange(0, HEAD, gl.SliceLayout(0, sums))
        place = row.to(gl.int64)[:, None] * (heads * HEAD) + channel[None, :]
        gl.store(out + place, o.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        count += 1
        turn += 1


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["rows", "keys", "row_tiles", "tiles"])
def _attention(
    q, k, v, q_scale, k_scale, scale_head, out, redo, rows, keys, heads, row_tiles, tiles, STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = k.block_shape[0]
    shared = (
        gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_shape, q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_shape, k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_shape, v.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    # Keys are there once their copy is and the copies of their scales by 32 threads are.
    ready = _barriers(GROUPS, 1), _barriers(STAGES, 1 + 32), _barriers(STAGES, 1)
    empty = _barriers(GROUPS, 1), _barriers(STAGES, GROUPS), _barriers(STAGES, GROUPS)
    fence_async_shared()
    given = (q_scale, out, redo, rows, keys, heads, row_tiles, tiles)
    gl.warp_specialize(
        [
            (_attend, (0, shared, ready, empty, given)),
            (_attend, (1, shared, ready, empty, given)),
            (_load, ((q, k, v, k_scale, scale_head), shared, ready, empty, keys, row_tiles, tiles)),
        ],
        [4, 1],
        [240, 24],
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(x_BTHK: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head; beyond the last token there are zeros."""
    block = [rows, HEAD]
    layout = gl.NVMMASharedLayout.get_default_for(block, _KINDS[x_BTHK.dtype])
    return TensorDescriptor.from_tensor(x_BTHK[0].flatten(1), block, layout)


def attend(q: Heads, k: Heads, v_BSHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in bfloat16. Rows are contiguous. Raises ValueError for other sizes or dtypes."""
    if v_BSHK.dtype != torch.bfloat16 or v_BSHK.shape[0] != 1 or v_BSHK.shape[3] != HEAD:
        raise ValueError(f"takes one batch of heads of {HEAD} in bfloat16, not {v_BSHK.dtype} {tuple(v_BSHK.shape)}")
    k_scale = k.scale.transpose(1, 2)
    k_scale = k_scale if k_scale.stride(2) == 1 else k_scale.contiguous()
    out = torch.empty_like(q.values, dtype=v_BSHK.dtype)
    _, count, heads, _ = out.shape
    row_tiles = triton.cdiv(count, GROUPS * ROWS)
    tiles = row_tiles * heads
    redo = torch.empty(tiles * GROUPS, device=out.device, dtype=torch.int32)
    launch(
        _attention, (min(tiles, _processors(out.device)),), out, _tiles(q.values, ROWS), _tiles(k.values, KEYS),
        _tiles(v_BSHK, KEYS), q.scale, k_scale, k_scale.stride(1), out, redo, count, v_BSHK.shape[1], heads, row_tiles,
        tiles, warps=4, STAGES=STAGES, GROUPS=GROUPS,
    )  # fmt: skip
    return attention_triton.attend(q, k, v_BSHK, out, redo)
