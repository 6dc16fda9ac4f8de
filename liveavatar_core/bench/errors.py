"""How far each shortcut is from bf16 with exact attention: the velocity of every forward, on the same inputs.

Every variant is given the reference's latents at every block and step, so that errors are those of one forward and
of what its caches remember, and do not add up over steps. One step after the other runs through all blocks: at no time
is there more than one model and the caches of one step.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liveavatar_core.config import ModelConfig, SamplingConfig
from liveavatar_core.geometry import FRAMES_PER_BLOCK, MOTION_LATENTS, Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import PREFILL, StageSpec, tpp
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning, Payload
from liveavatar_core.weights.quant import quantise_linears

BY_ROW, PER_TENSOR = "fp8 by row", "fp8 per tensor (original)"
FORMATS = {  # by precision: (attention, kv_cache) as in RuntimeSpec
    "bf16": [("exact", "full"), ("int8", "full"), ("exact", "fp8")],
    PER_TENSOR: [("exact", "full")],
    BY_ROW: [("exact", "full"), ("int8", "fp8")],
}

Load = Callable[[str], CausalDiT]
"""The model in "bf16" or "fp8"; a new one at every call."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What all variants are given."""

    geometry: Geometry
    sampling: SamplingConfig
    conditioning: Conditioning
    sounds: Sequence[Tensor]  # one (1, states, width, 12) for each block


def random_inputs(config: ModelConfig, geometry: Geometry, steps: int, blocks: int) -> Inputs:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (geometry.latent_height, geometry.latent_width)
    return Inputs(
        geometry,
        SamplingConfig(steps=steps, seed=1, reanchor_block=None),
        Conditioning(
            random(77, config.text_dim),
            random(config.channels, 1, *size),
            random(config.channels, MOTION_LATENTS, *size),
        ),
        [random(1, config.audio_states, config.audio_dim, FRAMES_PER_BLOCK) for _ in range(blocks)],
    )


@torch.inference_mode()
def compare(load: Load, inputs: Inputs, device: str, say: Callable[[str], None]) -> Iterator[dict]:
    """One line per variant as it is measured: errors of the velocity against bf16 exact, over blocks and steps."""
    reference = None
    model = load("bf16")
    for precision, formats in FORMATS.items():
        if precision == PER_TENSOR:
            quantise_linears(model, by_row=False)
        elif precision == BY_ROW:
            del model
            gc.collect()
            model = load("fp8")
        for attention, kv_cache in formats:
            variant = ", ".join(
                [precision]
                + (["int8 attention"] if attention == "int8" else [])
                + (["fp8 KV cache"] if kv_cache == "fp8" else [])
            )
            say(variant)
            seen = _record(model, inputs, device, attention, kv_cache, reference)
            if reference is None:
                reference = seen
            else:
                settings = {"precision": precision, "attention": attention, "kv_cache": kv_cache}
                yield {"variant": variant, **settings, **_distance(seen, reference)}


@dataclass(frozen=True, slots=True)
class _Recording:
    """By step, then block, on the host."""

    latents: list[list[Tensor]]  # after the step
    velocities: list[list[Tensor]]


def _record(
    model: CausalDiT, inputs: Inputs, device: str, attention: str, kv_cache: str, fed: _Recording | None
) -> _Recording:
    """All forwards; from the latents of `fed` if given."""
    recording = _Recording([], [])
    payloads = [Payload(n, step=0, sink=0, request=BlockRequest(n, sound)) for n, sound in enumerate(inputs.sounds)]
    steps = inputs.sampling.evaluations
    for spec in tpp(steps, model.config.layers, [device] * steps).stages:
        stage = _stage(spec, model, inputs, attention, kv_cache)
        if fed is not None and spec.steps.start > 0:
            before = fed.latents[spec.steps.start - 1]
            payloads = [replace(payload, latent=latent) for payload, latent in zip(payloads, before, strict=True)]
        velocities: list[Tensor] = []
        hook = model.head.register_forward_hook(lambda *call, seen=velocities: seen.append(call[-1].float().cpu()))
        payloads = [stage.run(payload) for payload in payloads]
        hook.remove()
        recording.latents.append([payload.latent.cpu() for payload in payloads])
        recording.velocities.append(velocities)
        del stage  # its caches make room for the next step's
        gc.collect()
    return recording


def _stage(spec: StageSpec, model: CausalDiT, inputs: Inputs, attention: str, kv_cache: str) -> Stage:
    stage = Stage(
        spec,
        model,
        inputs.geometry,
        inputs.sampling,
        levels(inputs.sampling),
        inputs.conditioning.text,
        attention=attention,
        kv_cache=kv_cache,
    )
    condition = (inputs.conditioning.reference, inputs.conditioning.motion)
    stage.run(Payload(PREFILL, PREFILL, sink=0, condition=condition))
    return stage


def _distance(seen: _Recording, reference: _Recording) -> dict:
    """Relative L2 and 1 - cosine of each forward's velocity: means and largest, and the former by step."""
    steps = [
        [_errors(a, b) for a, b in zip(*velocities, strict=True)]
        for velocities in zip(seen.velocities, reference.velocities, strict=True)
    ]
    distances, cosines = torch.tensor(steps, dtype=torch.float64).unbind(-1)
    return {
        "relative_l2": distances.mean().item(),
        "relative_l2_max": distances.max().item(),
        "cosine_error": cosines.mean().item(),
        "cosine_error_max": cosines.max().item(),
        "relative_l2_by_step": distances.mean(1).tolist(),
    }


def _errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    a, b = got.double().flatten(), want.double().flatten()
    return ((a - b).norm() / b.norm()).item(), (1 - a @ b / (a.norm() * b.norm())).item()
