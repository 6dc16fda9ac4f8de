"""Many clips through the DiT at once, all their blocks in one forward, with the keys and values of inference.

The model's own layers run, as in pipeline.stage, with other closures for what a layer may see: at one noise level a
layer's keys of all blocks exist before any block looks at them, so that blocks are to a layer what clips are: more of
a batch. The gradient of a late block reaches what an earlier one left for it. tests/test_training_forward.py shows that
both give the same.
Legend: B clips, N blocks, C channels, F latent frames of a block, h w latent size, T tokens, D width, H heads, K head
width; in a batch of N B the clips of a block are side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.geometry import LATENTS_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.model import layers, pointwise
from liveavatar_core.model.audio import Heard
from liveavatar_core.model.dit import CausalDiT, TimeTable
from liveavatar_core.model.layers import KeyValue, Values
from liveavatar_core.model.rope import (
    REFERENCE_POSITION,
    grid_factors,
    motion_factors,
    reference_factors,
    reference_position,
)

FUSED = ("norm", "add_norm", "gated", "gelu", "rms_norm", "rotate")


@contextmanager
def gradients(*, fused: bool = False) -> Iterator[None]:
    """The engine's kernels know no gradients: inside, the plain forms run. `fused`: compiled, each a kernel or two;
    a step on a GPU is mostly what lies between the matrix products."""
    forms = {name: torch.compile(getattr(pointwise, name), dynamic=False) for name in FUSED} if fused else {}
    with patch.object(pointwise, "_kernels", lambda device: None), patch.multiple(layers, attend=_attend, **forms):
        yield


@dataclass(frozen=True, slots=True)
class _Seen:
    """Keys of N B. Those of the first blocks begin with what would be before the first, which nobody may see."""

    k: Tensor
    clips: int
    tokens: int  # of a block


def _attend(q_BTHK: Tensor, k: Tensor | _Seen, v_BSHK: Tensor) -> Tensor:
    if isinstance(k, Tensor):
        return _attend_all(q_BTHK, k, v_BSHK)
    parts = []
    for absent in range(WINDOW_BLOCKS - 1, -1, -1):
        first = (WINDOW_BLOCKS - 1 - absent) * k.clips
        rows = slice(first, first + k.clips if absent else None)
        seen = slice(absent * k.tokens, None)
        if q_BTHK[rows].shape[0]:
            parts.append(_attend_all(q_BTHK[rows], k.k[rows, seen], v_BSHK[rows, seen]))
    return torch.cat(parts)


def _attend_all(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Sink:
    """One layer's attention sink of all clips: keys of the reference not rotated, those of the motion rotated."""

    reference_k: Tensor
    motion_k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Conditions:
    """What does not depend on the noise level, once for all levels; of N B."""

    grid: tuple[int, int]
    factors: Tensor  # (N B, T, K/2, 2) of the noisy tokens
    text: list[KeyValue]  # by layer
    heard: list[Heard]  # by injection; every latent frame of every clip is one of the model's frames
    sinks: list[Sink]  # by layer


def conditions(
    model: CausalDiT,
    geometry: Geometry,
    *,
    text_BSD: Tensor,
    features_BNSDt: Tensor,
    references_VBCFhw: Tensor,
    motion_BCFhw: Tensor,
    versions_N: Tensor,
    waves_W: Tensor,
    sink_TK2: Tensor,
    factors_NTK2: Tensor,
) -> Conditions:
    """`text` zero beyond its end, `features` (B, N, states, width, 12), `references` by version of the attention sink,
    `versions` int64, the sink that each block looks at, `waves` of timestep 0, `sink` as `sink_factors` and `factors`
    as `blocks_factors` make them."""
    clips, blocks = features_BNSDt.shape[:2]
    texts = [model.embed_text(text_SD) for text_SD in text_BSD]
    text = [tuple(torch.cat(parts) for parts in zip(*clips, strict=True)) for clips in zip(*texts, strict=True)]
    audio = model.casual_audio_encoder.block(features_BNSDt.transpose(0, 1).flatten(0, 1), model.dtype)
    one = replace(audio, local=audio.local.flatten(0, 1)[None], pooled=audio.pooled.flatten(0, 1)[None])
    modulation = model.modulate(waves_W).modulation
    made = [
        _prefill(model, geometry, text, reference, motion_BCFhw, modulation, sink_TK2)
        for reference in references_VBCFhw
    ]
    return Conditions(
        geometry.grid,
        factors_NTK2.repeat_interleave(clips, 0),
        [(k.repeat(blocks, 1, 1, 1), v.repeat(blocks, 1, 1, 1)) for k, v in text],
        [model.audio_injector.hear(injection, one) for injection in range(len(model.config.audio_layers))],
        [_chosen(sinks, versions_N) for sinks in zip(*made, strict=True)],
    )


def _chosen(sinks: Sequence[Sink], versions_N: Tensor) -> Sink:
    """What every block looks at."""
    names = [field.name for field in fields(Sink)]
    stacked = (torch.stack([getattr(sink, name) for sink in sinks]) for name in names)
    return Sink(*(x.index_select(0, versions_N).flatten(0, 1) for x in stacked))


def _prefill(
    model: CausalDiT,
    geometry: Geometry,
    text: list[KeyValue],
    reference_BCFhw: Tensor,
    motion_BCFhw: Tensor,
    modulation_6D: Tensor,
    factors: Tensor,
) -> list[Sink]:
    x_BTD = torch.vmap(model.embed_condition)(reference_BCFhw, motion_BCFhw).squeeze(1)
    frame = geometry.tokens_per_frame
    sinks: list[Sink] = []

    def see(k: Tensor, norm: Tensor, values: Values) -> KeyValue:
        k, v = layers.rms_norm(k.flatten(2), norm).view_as(k), values(None)
        rotated = layers.rotate(k, factors)
        sinks.append(Sink(k[:, :frame], rotated[:, frame:], v))
        return rotated, v

    for layer, context in zip(model.blocks.values(), text, strict=True):
        x_BTD = layer(x_BTD, modulation_6D, factors, context, see)
    return sinks


def velocities(
    model: CausalDiT, known: Conditions, latents_NBCFhw: Tensor, waves_W: Tensor, references_NTK2: Tensor
) -> Tensor:
    """The model's velocity (N, B, C, F, h, w) for every block, all at the noise level of `waves`.

    `references`: as `references_factors` makes them.
    """
    time, config = model.modulate(waves_W), model.config
    blocks, clips = latents_NBCFhw.shape[:2]
    references = references_NTK2.repeat_interleave(clips, 0)
    x_BTD = _embed(model, latents_NBCFhw.flatten(0, 1))
    for number, (layer, context) in enumerate(zip(model.blocks.values(), known.text, strict=True)):
        see = _see(known.sinks[number], references, known.factors, blocks)
        x_BTD = layer(x_BTD, time.modulation, known.factors, context, see)
        if number in config.audio_layers:
            injection = config.audio_layers.index(number)
            x_BTD = model.audio_injector(x_BTD.flatten(0, 1)[None], injection, known.heard[injection])[0].view_as(x_BTD)
    return _velocity(model, x_BTD, time, known.grid).unflatten(0, (blocks, clips))


def _see(sink: Sink, references: Tensor, factors: Tensor, blocks: int):
    """What a block sees: the three blocks before it, itself, its sink."""

    def see(k: Tensor, norm: Tensor, values: Values) -> tuple[_Seen, Tensor]:
        v, tokens = values(None), k.shape[1]
        rotated = layers.rotate(k, factors, norm_D=norm), layers.rotate(sink.reference_k, references), sink.motion_k
        k, *sinks = (x.to(v.dtype) for x in rotated)  # float32 from the norm, and every key is copied four times
        keys, seen = torch.cat((*_window(k, blocks), *sinks), 1), torch.cat((*_window(v, blocks), sink.v), 1)
        return _Seen(keys, len(k) // blocks, tokens), seen

    return see


def _window(x_BTHK: Tensor, blocks: int) -> list[Tensor]:
    """Each block's past, oldest first, then itself: four of (N B, T, H, K). Zeros before the first."""
    clips = len(x_BTHK) // blocks
    padded = F.pad(x_BTHK, (0, 0) * 3 + ((WINDOW_BLOCKS - 1) * clips, 0))
    return [padded[i * clips : i * clips + len(x_BTHK)] for i in range(WINDOW_BLOCKS)]


def blocks_factors(geometry: Geometry, head_dim: int, first_block: int, blocks: int) -> Tensor:
    """(N, T, K/2, 2) of the noisy tokens."""
    first = LATENTS_PER_BLOCK * first_block
    rows, columns = geometry.grid
    times = range(first, first + LATENTS_PER_BLOCK * blocks)
    return grid_factors(times, range(rows), range(columns), head_dim, True).unflatten(0, (blocks, -1))


def references_factors(geometry: Geometry, head_dim: int, first_block: int, distances: Sequence[int]) -> Tensor:
    """(N, T, K/2, 2) of the reference; `distances`: how far ahead of each block it sits, in latents."""
    rows, columns = geometry.grid
    firsts = range(
        LATENTS_PER_BLOCK * first_block, LATENTS_PER_BLOCK * (first_block + len(distances)), LATENTS_PER_BLOCK
    )
    positions = [reference_position(first, distance) for first, distance in zip(firsts, distances, strict=True)]
    return grid_factors(positions, range(rows), range(columns), head_dim, True).unflatten(0, (len(positions), -1))


def sink_factors(geometry: Geometry, head_dim: int) -> Tensor:
    """(T, K/2, 2) of the prefill: reference, then motion."""
    place = geometry, head_dim, True
    return torch.cat((reference_factors(REFERENCE_POSITION, *place), motion_factors(*place)))


# The model takes one clip. Where frames do not see each other, many clips are one with more frames.


def _embed(model: CausalDiT, latent_BCFhw: Tensor) -> Tensor:
    frames = latent_BCFhw.transpose(0, 1).flatten(1, 2)
    return model.embed_block(frames).unflatten(1, (latent_BCFhw.shape[0], -1))[0]


def _velocity(model: CausalDiT, x_BTD: Tensor, time: TimeTable, grid: tuple[int, int]) -> Tensor:
    frames = model.velocity(x_BTD.flatten(0, 1)[None], time, grid)
    return frames.unflatten(1, (x_BTD.shape[0], -1)).transpose(0, 1)
