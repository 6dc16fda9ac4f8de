"""What the parts of the model cost, counted from their shapes, and how fast a plan will then be. No torch.

Costs are in TFLOP of plain bf16 matrix products, so that one measured number, TFLOP per second of those, is a device's
speed. What is slower or faster than plain products counts for more or less than its own operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from liveavatar_core.config import ModelConfig
from liveavatar_core.geometry import FRAMES_PER_BLOCK, PATCH, WINDOW_BLOCKS, Geometry
from liveavatar_core.pipeline.plan import Machine, Plan, StageSpec, Work

TERA = 1e12
# Operations of a plain product that take as long as one of these. Measured on an H100 hot, 704x384, against 760
# TFLOP/s of bf16 products: products in fp8 1,330, attention 500, VAE 450 (bench/results).
FP8_PRODUCTS, ATTENTION, VAE = 0.57, 1.5, 1.7
# Norms, gates and gaps between kernels, in bytes moved of the residual stream; 3 TB/s go with 760 TFLOP/s.
PASSES, FLOP_PER_BYTE = 25, 250
VAE_FLOP_PER_PIXEL = 9.16e12 / (704 * 384)  # of one latent frame's decoding, SPEC 8.2
HEAD = 2  # products of embedding or head, with their norms, as passes over the residual stream


def work(config: ModelConfig, geometry: Geometry, precision: str) -> Work:
    """One block's, with a full window. `precision` as in RuntimeSpec."""
    tokens, dim = geometry.tokens_per_block, config.dim
    keys = geometry.sink_tokens + WINDOW_BLOCKS * tokens
    scale = FP8_PRODUCTS if precision == "fp8" else 1.0
    products = 12 * tokens * dim * dim + 4 * tokens * dim * config.ffn_dim  # q k v o, q o of the text, feed-forward
    attention = 4 * tokens * dim * (keys + config.text_len)
    moved = PASSES * FLOP_PER_BYTE * 2 * tokens * dim
    layer = products * scale + attention * ATTENTION + moved
    injection = 4 * tokens * dim * dim * scale
    patch = 2 * tokens * dim * config.channels * PATCH**2
    return Work(
        layers=tuple(
            (layer + (injection if index in config.audio_layers else 0)) / TERA for index in range(config.layers)
        ),
        embed=(patch + HEAD * moved / PASSES) / TERA,
        head=(patch + HEAD * moved / PASSES) / TERA,
        decode=VAE * 3 * VAE_FLOP_PER_PIXEL * prod((geometry.height, geometry.width)) / TERA,
        hidden=2 * tokens * dim,
    )


@dataclass(frozen=True, slots=True)
class Rate:
    """What a plan may be expected to do once the window is full, if nothing gets in its way."""

    block: float  # seconds from block to block
    latency: float  # seconds from a block's sound to its frames, in a pipeline with nothing else in it
    busy: Mapping[str, float]  # device -> share of the time it works

    @property
    def fps(self) -> float:
        return FRAMES_PER_BLOCK / self.block


def rate(plan: Plan, work: Work, machine: Machine, streamed: Mapping[int, int] | None = None) -> Rate:
    """Of a plan, by its busiest device or link. `streamed`: stage -> bytes from host memory in every step."""
    seconds: dict[str, float] = {plan.decoder: work.decode / machine.speed(plan.decoder)}
    latency, links = seconds[plan.decoder], 0.0
    for stage in plan.stages:
        step = max(hop_seconds(plan, stage, work, machine), (streamed or {}).get(stage.index, 0) / machine.bus)
        row = plan.rows[stage.row]
        copy = 0.0  # latents, which pass from row to row and back to its beginning, are small
        if stage.column + 1 < len(row):
            copy = machine.copy_seconds(stage.device, row[stage.column + 1].device, work.hidden)
        seconds[stage.device] = seconds.get(stage.device, 0.0) + len(stage.steps) * step
        latency += len(stage.steps) * (step + copy)
        links = max(links, len(stage.steps) * copy)
    block = max(links, *seconds.values())
    return Rate(block, latency, {device: taken / block for device, taken in seconds.items()})


def hop_seconds(plan: Plan, stage: StageSpec, work: Work, machine: Machine) -> float:
    """Of one step of a stage that has its device to itself."""
    cost = sum(work.layers[layer] for layer in stage.layers)
    cost += work.embed * (stage.column == 0) + work.head * (stage.column + 1 == len(plan.rows[stage.row]))
    return cost / machine.speed(stage.device)
