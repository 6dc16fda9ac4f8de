"""Keys, values and queries in 8 bits: what is lost against exact attention, and that a cache of any format keeps the
same promises. Bounds are the measured errors and half as much again; a smaller bound would test the random numbers."""

import pytest
import torch
from torch import Tensor

from liveavatar_core.config import ATTENTIONS, KV_CACHES
from liveavatar_core.geometry import WINDOW_BLOCKS, Geometry
from liveavatar_core.model.attention import attend
from liveavatar_core.model.cache import BlockCache, SinkLayer, token_bytes
from liveavatar_core.model.pointwise import FP8, Heads, dequantise_heads, hadamard, quantise_heads, rms_norm, rotate
from liveavatar_core.model.rope import block_factors, motion_factors, reference_factors

HEADS, HEAD = 4, 64
WIDTH = HEADS * HEAD
GEOMETRY = Geometry(64, 80)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def smooth() -> tuple[Tensor, Tensor, Tensor]:
    return draw(1, 1, 60, HEADS, HEAD), draw(2, 1, 300, HEADS, HEAD), draw(3, 1, 300, HEADS, HEAD)


def outliers() -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries and keys in which a few channels are large, as a trained model's are."""
    q, k, v = smooth()
    gain = torch.ones(WIDTH)
    gain[torch.arange(0, WIDTH, 16)] = 8.0
    q, k = (rms_norm((x.flatten(2) * gain), torch.ones(WIDTH)).view_as(x) for x in (q, k))
    return q, k, v


@pytest.mark.parametrize("width", [16, 64, 96, 128])
def test_turning_twice_is_the_identity(width):
    turn = hadamard(width, torch.device("cpu")).float()
    block = width & -width
    assert torch.equal(turn @ turn, block * torch.eye(width))
    assert turn.abs().sum(0).eq(block).all()


@pytest.mark.parametrize(("kind", "bound"), [(torch.int8, 0.0095), (FP8, 0.038)])
@pytest.mark.parametrize("make", [smooth, outliers])
def test_a_head_survives_eight_bits(make, kind, bound):
    for x in make():
        heads = quantise_heads(x, kind=kind)
        assert heads.values.dtype == kind and heads.scale.shape == x.shape[:-1]
        assert heads.values.float().abs().amax(-1).eq(127 if kind == torch.int8 else 448).all()
        got = dequantise_heads(heads, torch.float32)
        if kind == torch.int8:
            got = got @ hadamard(HEAD, x.device).float() / HEAD**0.5
        assert error(got, x) < bound


def test_turning_is_what_saves_outliers():
    """A channel a hundred times as large leaves the others of an unturned head a few levels each."""
    x = draw(1, 1, 50, HEADS, HEAD)
    x[..., 3] *= 100
    turned = dequantise_heads(quantise_heads(x), torch.float32) @ hadamard(HEAD, x.device).float() / HEAD**0.5
    step = x.abs().amax(-1, keepdim=True) / 127
    unturned = (x / step).round() * step
    others = torch.arange(HEAD) != 3
    assert error(turned[..., others], x[..., others]) < 0.25 * error(unturned[..., others], x[..., others])


def test_nothing_is_still_nothing():
    x = torch.zeros(1, 3, HEADS, HEAD)
    for kind in (torch.int8, FP8):
        assert not dequantise_heads(quantise_heads(x, kind=kind), torch.float32).any()


@pytest.mark.parametrize(("make", "bound"), [(smooth, 0.013), (outliers, 0.016)])
def test_int8_attention_is_near_the_exact_one(make, bound):
    q, k, v = make()
    got = attend(quantise_heads(q), quantise_heads(k), v)
    assert 0 < error(got, attend(q, k, v)) < bound


FORMATS = [(attention, kv_cache) for attention in ATTENTIONS for kv_cache in KV_CACHES]
LOSS = {("exact", "full"): 1e-6, ("int8", "full"): 0.014, ("exact", "fp8"): 0.057, ("int8", "fp8"): 0.042}


def cache_of(attention: str, kv_cache: str) -> BlockCache:
    device = torch.device("cpu")
    return BlockCache(GEOMETRY, HEADS, HEAD, device=device, dtype=torch.float32, attention=attention, kv_cache=kv_cache)


def sink() -> SinkLayer:
    frame, motion = GEOMETRY.tokens_per_frame, GEOMETRY.motion_tokens
    shapes = ((frame, 11), (motion, 12), (frame + motion, 13))
    return SinkLayer(*(draw(seed, 1, tokens, HEADS, HEAD) for tokens, seed in shapes))


@pytest.mark.parametrize(("attention", "kv_cache"), FORMATS)
def test_cache_shows_the_sink_and_the_last_four_blocks(attention, kv_cache):
    """Attention over what a cache returns, against attention over exactly those keys and values by hand."""
    cache, given, norm = cache_of(attention, kv_cache), sink(), 1 + 0.1 * draw(5, WIDTH)
    motion = motion_factors(GEOMETRY, HEAD, True, "cpu")
    cache.install(given, motion)
    past: list[tuple[Tensor, Tensor]] = []
    for block in range(WINDOW_BLOCKS + 3):
        reference, factors = (
            reference_factors(7 + block, GEOMETRY, HEAD, True),
            block_factors(block, GEOMETRY, HEAD, True),
        )
        q, k, v = (draw(100 + 3 * block + i, 1, GEOMETRY.tokens_per_block, HEADS, HEAD) for i in range(3))
        cache.roll(reference)
        cache.advance(block)
        k_seen, v_seen = cache.update(block, k, norm, lambda out, v=v: v if out is None else out.copy_(v), factors)
        past.append((rotate(k, factors, norm_D=norm), v))
        window = past[-WINDOW_BLOCKS:]
        k_all = torch.cat(
            (rotate(given.reference_k, reference), rotate(given.motion_k, motion), *(k for k, _ in window)), 1
        )
        v_all = torch.cat((given.v, *(v for _, v in window)), 1)
        turned = quantise_heads(q) if isinstance(k_seen, Heads) else q
        assert k_seen.values.dtype == torch.int8 if isinstance(k_seen, Heads) else attention == "exact"
        assert error(attend(turned, k_seen, v_seen), attend(q, k_all, v_all)) < LOSS[attention, kv_cache]


@pytest.mark.parametrize(("attention", "kv_cache"), FORMATS)
def test_cache_lives_in_the_memory_it_is_given(attention, kv_cache):
    here, there = cache_of(attention, kv_cache), cache_of(attention, kv_cache)
    tokens = GEOMETRY.sink_tokens + WINDOW_BLOCKS * GEOMETRY.tokens_per_block
    assert all(tensor.shape[:2] == (1, tokens) for tensor in here.memory)
    nbytes = sum(tensor.nbytes for tensor in here.memory)
    assert nbytes == tokens * token_bytes(HEADS, HEAD, torch.float32, attention, kv_cache)

    def see(cache: BlockCache) -> list[Tensor]:
        norm, factors = torch.ones(WIDTH), block_factors(0, GEOMETRY, HEAD, True)
        k, v = (draw(seed, 1, GEOMETRY.tokens_per_block, HEADS, HEAD) for seed in (1, 2))
        k_seen, v_seen = cache.update(0, k, norm, lambda out: v if out is None else out.copy_(v), factors)
        return [k_seen.values, k_seen.scale, v_seen] if isinstance(k_seen, Heads) else [k_seen, v_seen]

    motion, reference = motion_factors(GEOMETRY, HEAD, True, "cpu"), reference_factors(30, GEOMETRY, HEAD, True)
    there.place(tuple(torch.zeros_like(tensor) for tensor in there.memory))
    for cache in (here, there):
        cache.install(sink(), motion)
        cache.roll(reference)
    for a, b in zip(see(here), see(there), strict=True):
        assert torch.equal(a, b)
    moved = tuple(tensor.clone() for tensor in there.memory)
    there.place(moved)
    assert all(a is b for a, b in zip(there.memory, moved, strict=True))
    for a, b in zip(see(here), see(there), strict=True):
        assert torch.equal(a, b)
    written = GEOMETRY.sink_tokens + GEOMETRY.tokens_per_block
    for a, b in zip(here.memory, moved, strict=True):
        assert torch.equal(a[:, :written], b[:, :written])


def test_eight_bits_halve_a_bfloat16_ring():
    full, fp8, int8, both = (token_bytes(40, 128, torch.bfloat16, *kind) for kind in FORMATS)
    assert full == 40 * 128 * 2 * 2
    assert int8 == full - 40 * (128 - 4)
    assert fp8 == both == 40 * 2 * (128 + 4)
