"""Many clips through the DiT at once, all their blocks in one forward, with the keys and values of inference.

The model's own layers run, as in pipeline.stage, with other closures for what a layer may see: instead of a cache that
is written block after block, every layer is run for block 0, 1, 2, ... before the next layer, so that the gradient of
a late block reaches what an earlier one left for it. tests/test_training_forward.py shows that both give the same.
Legend: B clips, N blocks, C channels, F latent frames of a block, h w latent size, T tokens, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.geometry import LATENTS_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.model import layers, pointwise
from liveavatar_core.model.audio import AudioTokens
from liveavatar_core.model.dit import CausalDiT, TimeTable
from liveavatar_core.model.layers import KeyValue, Values
from liveavatar_core.model.rope import (
    REFERENCE_POSITION,
    block_factors,
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


def _attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
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
    """What does not depend on the noise level, once for all levels."""

    geometry: Geometry
    first_block: int  # of the stream, where these clips begin
    text: list[KeyValue]  # by layer
    audio: list[AudioTokens]  # by block; the clips follow each other as latent frames do
    sinks: list[list[Sink]]  # by version and layer
    versions: Sequence[int]  # of the sink that each block looks at


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
    """`text` zero beyond its end, `features` (B, N, states, width, 12), `references` (B, C, 1, h, w) by version."""
    text = [(k.squeeze(1), v.squeeze(1)) for k, v in torch.vmap(model.embed_text)(text_BSD)]
    blocks = features_BNSDt.shape[1]
    tokens = model.casual_audio_encoder.block(features_BNSDt.transpose(0, 1).flatten(0, 1), model.dtype)
    audio = [
        AudioTokens(local.flatten(0, 1)[None], pooled.flatten(0, 1)[None])
        for local, pooled in zip(tokens.local.chunk(blocks), tokens.pooled.chunk(blocks), strict=True)
    ]
    sinks = [_prefill(model, geometry, text, reference, motion_BCFhw) for reference in references]
    return Conditions(geometry, first_block, text, audio, sinks, versions)


def _prefill(
    model: CausalDiT, geometry: Geometry, text: list[KeyValue], reference_BCFhw: Tensor, motion_BCFhw: Tensor
) -> list[Sink]:
    x_BTD = torch.vmap(model.embed_condition)(reference_BCFhw, motion_BCFhw).squeeze(1)
    motion = _factors(model, geometry, motion_factors)
    factors = torch.cat((_factors(model, geometry, reference_factors, REFERENCE_POSITION), motion))
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
    model: CausalDiT, known: Conditions, latents_NBCFhw: Sequence[Tensor], timestep: float, distances: Sequence[int]
) -> list[Tensor]:
    """The model's velocity (B, C, F, h, w) for every block, all at one noise level.

    `distances`: how far ahead of each block the reference sits, in latents.
    """
    time, config = model.time_table(timestep), model.config
    blocks = range(known.first_block, known.first_block + len(latents_NBCFhw))
    factors = [_factors(model, known.geometry, block_factors, block) for block in blocks]
    references = [
        _factors(model, known.geometry, reference_factors, reference_position(LATENTS_PER_BLOCK * block, distance))
        for block, distance in zip(blocks, distances, strict=True)
    ]
    hidden = [_embed(model, latent) for latent in latents_NBCFhw]
    for number, (layer, context) in enumerate(zip(model.blocks.values(), known.text, strict=True)):
        window: list[KeyValue] = []
        for i in range(len(hidden)):
            sink = known.sinks[known.versions[i]][number]
            see = _see(sink, references[i], factors[i], window)
            hidden[i] = layer(hidden[i], time.modulation, factors[i], context, see)
            if number in config.audio_layers:
                hidden[i] = _inject(model, config.audio_layers.index(number), hidden[i], known.audio[i])
    return [_velocity(model, x, time, known.geometry.grid) for x in hidden]


def _see(sink: Sink, reference: Tensor, factors: Tensor, window: list[KeyValue]):
    """What a block sees: its sink, the three blocks before it, itself. `window` grows by this block."""

    def see(k: Tensor, norm: Tensor, values: Values) -> KeyValue:
        window.append((layers.rotate(k, factors, norm_D=norm), values(None)))
        keys, values = zip(*window[-WINDOW_BLOCKS:], strict=True)
        return (
            torch.cat((layers.rotate(sink.reference_k, reference), sink.motion_k, *keys), 1),
            torch.cat((sink.v, *values), 1),
        )

    return see


def _factors(model: CausalDiT, geometry: Geometry, table, *place: int) -> Tensor:
    return table(*place, geometry, model.config.head_dim, True, model.text_embedding[0].weight.device)


# The model takes one clip. Where frames do not see each other, many clips are one with more frames.


def _embed(model: CausalDiT, latent_BCFhw: Tensor) -> Tensor:
    frames = latent_BCFhw.transpose(0, 1).flatten(1, 2)
    return model.embed_block(frames).unflatten(1, (latent_BCFhw.shape[0], -1))[0]


def _inject(model: CausalDiT, injection: int, x_BTD: Tensor, audio: AudioTokens) -> Tensor:
    heard = model.audio_injector.hear(injection, audio)
    return model.audio_injector(x_BTD.flatten(0, 1)[None], injection, heard)[0].view_as(x_BTD)


def _velocity(model: CausalDiT, x_BTD: Tensor, time: TimeTable, grid: tuple[int, int]) -> Tensor:
    frames = model.velocity(x_BTD.flatten(0, 1)[None], time, grid)
    return frames.unflatten(1, (x_BTD.shape[0], -1)).transpose(0, 1)
