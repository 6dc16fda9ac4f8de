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

_FUSED = ("norm", "add_norm", "gated", "gelu", "rotate", "rms_norm")  # pointwise functions that the layers call


@contextmanager
def gradients(*, fuse: bool) -> Iterator[None]:
    """The engine's kernels know no gradients: inside, the plain forms run. `fuse`: through torch.compile."""
    with (
        patch.object(pointwise, "_kernels", lambda device: None),
        patch.object(layers, "attend", _attend),
    ):
        if not fuse:
            yield
            return
        torch._dynamo.config.recompile_limit = 64  # a few shapes and flags each
        fused = {name: torch.compile(getattr(pointwise, name), dynamic=False) for name in _FUSED}
        with patch.multiple(layers, **fused):
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

    geometry: Geometry
    first_block: int  # of the stream, where these clips begin
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
    references: Sequence[Tensor],
    motion_BCFhw: Tensor,
    versions: Sequence[int],
    first_block: int = 0,
) -> Conditions:
    """`text` zero beyond its end, `features` (B, N, states, width, 12), `references` (B, C, 1, h, w) by version of the
    attention sink, `versions` by block: the sink it looks at."""
    clips, blocks = features_BNSDt.shape[:2]
    text = [(k.squeeze(1), v.squeeze(1)) for k, v in torch.vmap(model.embed_text)(text_BSD)]
    audio = model.casual_audio_encoder.block(features_BNSDt.transpose(0, 1).flatten(0, 1), model.dtype)
    one = replace(audio, local=audio.local.flatten(0, 1)[None], pooled=audio.pooled.flatten(0, 1)[None])
    made = [_prefill(model, geometry, text, reference, motion_BCFhw) for reference in references]
    first = LATENTS_PER_BLOCK * first_block
    times = range(first, first + LATENTS_PER_BLOCK * blocks)
    return Conditions(
        geometry,
        first_block,
        _for_clips(_factors(model, geometry, times).unflatten(0, (blocks, -1)), clips),
        [(k.repeat(blocks, 1, 1, 1), v.repeat(blocks, 1, 1, 1)) for k, v in text],
        [model.audio_injector.hear(injection, one) for injection in range(len(model.config.audio_layers))],
        [_chosen(sinks, versions) for sinks in zip(*made, strict=True)],
    )


def _chosen(sinks: Sequence[Sink], versions: Sequence[int]) -> Sink:
    """What every block looks at."""
    names = [field.name for field in fields(Sink)]
    return Sink(*(torch.cat([getattr(sinks[version], name) for version in versions]) for name in names))


def _prefill(
    model: CausalDiT, geometry: Geometry, text: list[KeyValue], reference_BCFhw: Tensor, motion_BCFhw: Tensor
) -> list[Sink]:
    x_BTD = torch.vmap(model.embed_condition)(reference_BCFhw, motion_BCFhw).squeeze(1)
    place = geometry, model.config.head_dim, True, _device(model)
    motion = motion_factors(*place)
    factors = torch.cat((reference_factors(REFERENCE_POSITION, *place), motion))
    modulation = model.time_table(0.0).modulation
    frame = geometry.tokens_per_frame
    sinks: list[Sink] = []

    def see(k: Tensor, norm: Tensor, values: Values) -> KeyValue:
        k, v = layers.rms_norm(k.flatten(2), norm).view_as(k), values(None)
        rotated = layers.rotate(k, factors)
        sinks.append(Sink(k[:, :frame], rotated[:, frame:], v))
        return rotated, v

    for layer, context in zip(model.blocks.values(), text, strict=True):
        x_BTD = layer(x_BTD, modulation, factors, context, see)
    return sinks


def velocities(
    model: CausalDiT, known: Conditions, latents_NBCFhw: Tensor, timestep: float, distances: Sequence[int]
) -> Tensor:
    """The model's velocity (N, B, C, F, h, w) for every block, all at one noise level.

    `distances`: how far ahead of each block the reference sits, in latents.
    """
    time, config = model.time_table(timestep), model.config
    blocks, clips = latents_NBCFhw.shape[:2]
    firsts = (LATENTS_PER_BLOCK * (known.first_block + n) for n in range(blocks))
    positions = [reference_position(first, distance) for first, distance in zip(firsts, distances, strict=True)]
    references = _for_clips(_factors(model, known.geometry, positions).unflatten(0, (blocks, -1)), clips)
    x_BTD = _embed(model, latents_NBCFhw.flatten(0, 1))
    for number, (layer, context) in enumerate(zip(model.blocks.values(), known.text, strict=True)):
        see = _see(known.sinks[number], references, known.factors, blocks)
        x_BTD = layer(x_BTD, time.modulation, known.factors, context, see)
        if number in config.audio_layers:
            injection = config.audio_layers.index(number)
            x_BTD = model.audio_injector(x_BTD.flatten(0, 1)[None], injection, known.heard[injection])[0].view_as(x_BTD)
    return _velocity(model, x_BTD, time, known.geometry.grid).unflatten(0, (blocks, clips))


def _see(sink: Sink, references: Tensor, factors: Tensor, blocks: int):
    """What a block sees: the three blocks before it, itself, its sink."""

    def see(k: Tensor, norm: Tensor, values: Values) -> tuple[_Seen, Tensor]:
        reference_k = layers.rotate(sink.reference_k, references)
        tokens, (k, v) = k.shape[1], (layers.rotate(k, factors, norm_D=norm), values(None))
        keys = torch.cat((_window(k, blocks), reference_k, sink.motion_k), 1)
        return _Seen(keys, len(k) // blocks, tokens), torch.cat((_window(v, blocks), sink.v), 1)

    return see


def _window(x_BTHK: Tensor, blocks: int) -> Tensor:
    """(N B, T, H, K) -> (N B, 4 T, H, K): each block's past, oldest first, then itself. Zeros before the first."""
    x_NBTHK = F.pad(x_BTHK.unflatten(0, (blocks, -1)), (0, 0) * 4 + (WINDOW_BLOCKS - 1, 0))
    return torch.cat([x_NBTHK[i : i + blocks] for i in range(WINDOW_BLOCKS)], 2).flatten(0, 1)


def _factors(model: CausalDiT, geometry: Geometry, times: Sequence[int]) -> Tensor:
    rows, columns = geometry.grid
    return grid_factors(times, range(rows), range(columns), model.config.head_dim, True, _device(model))


def _for_clips(factors_NTK2: Tensor, clips: int) -> Tensor:
    return factors_NTK2.repeat_interleave(clips, 0)


def _device(model: CausalDiT) -> torch.device:
    return model.text_embedding[0].weight.device


# The model takes one clip. Where frames do not see each other, many clips are one with more frames.


def _embed(model: CausalDiT, latent_BCFhw: Tensor) -> Tensor:
    frames = latent_BCFhw.transpose(0, 1).flatten(1, 2)
    return model.embed_block(frames).unflatten(1, (latent_BCFhw.shape[0], -1))[0]


def _velocity(model: CausalDiT, x_BTD: Tensor, time: TimeTable, grid: tuple[int, int]) -> Tensor:
    frames = model.velocity(x_BTD.flatten(0, 1)[None], time, grid)
    return frames.unflatten(1, (x_BTD.shape[0], -1)).transpose(0, 1)
