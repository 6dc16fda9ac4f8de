"""The training forward against the engine: many clips and blocks at once give what a stage gives one by one."""

import pytest
import torch

from liveavatar_core.config import ModelConfig, SamplingConfig
from liveavatar_core.geometry import LATENTS_PER_BLOCK, Geometry
from liveavatar_core.model.dit import CausalDiT, waves
from liveavatar_core.pipeline.plan import PREFILL, StageSpec
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.sampling import euler, reference_distance, timestep
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Payload
from training.dit.forward import (
    blocks_factors,
    conditions,
    gradients,
    references_factors,
    sink_factors,
    velocities,
)

CONFIG = ModelConfig(
    dim=32,
    heads=2,
    ffn_dim=48,
    layers=3,
    audio_layers=(0, 2),
    audio_dim=16,
    audio_states=3,
    text_dim=16,
    text_len=8,
    freq_dim=32,
)
GEOMETRY = Geometry(64, 64)
CLIPS, BLOCKS, REANCHOR = 2, 6, 4
SAMPLING = SamplingConfig(steps=3, seed=5)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    torch.manual_seed(0)
    model = CausalDiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind a gate or an output of zero
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(CLIPS, *shape, generator=generator)

    return {
        "noise": draw(BLOCKS, 16, LATENTS_PER_BLOCK, 8, 8),
        "text": draw(5, CONFIG.text_dim),
        "features": draw(BLOCKS, CONFIG.audio_states, CONFIG.audio_dim, 12),
        "reference": draw(16, 1, 8, 8),
        "motion": draw(16, 19, 8, 8),
    }


def engine(model: CausalDiT, given: dict[str, torch.Tensor], clip: int) -> list[torch.Tensor]:
    """Finished latents of one clip, block after block, through a stage with its caches."""
    steps = levels(SAMPLING)
    stage = Stage(
        StageSpec(0, 0, 0, range(len(steps) - 1), range(CONFIG.layers), "cpu"),
        model,
        GEOMETRY,
        SAMPLING,
        steps,
        given["text"][clip],
    )

    def prefill(version: int, reference: torch.Tensor) -> None:
        stage.run(Payload(0, PREFILL, version, condition=(reference, given["motion"][clip])))

    prefill(0, given["reference"][clip])
    done = []
    for block in range(BLOCKS):
        sink = int(block >= REANCHOR)
        request = BlockRequest(block, given["features"][clip, block][None], sink, noise=given["noise"][clip, block])
        payload = Payload(block, 0, sink, request=request)
        while payload.step < len(steps) - 1:
            payload = stage.run(payload)
        done.append(payload.latent)
        if block == 0:
            prefill(1, payload.latent[:, :1])
    return done


def known_of(model, given, references: tuple[torch.Tensor, ...], versions: list[int]):
    return conditions(
        model,
        GEOMETRY,
        text_BSD=torch.nn.functional.pad(given["text"], (0, 0, 0, CONFIG.text_len - 5)),
        features_BNSDt=given["features"],
        references_VBCFhw=torch.stack(references),
        motion_BCFhw=given["motion"],
        versions_N=torch.tensor(versions),
        waves_W=waves(0.0, CONFIG.freq_dim),
        sink_TK2=sink_factors(GEOMETRY, CONFIG.head_dim),
        factors_NTK2=blocks_factors(GEOMETRY, CONFIG.head_dim, 0, BLOCKS),
    )


def test_all_blocks_at_once_equal_one_after_the_other(model, given):
    want = torch.stack([torch.stack(engine(model, given, clip)) for clip in range(CLIPS)], 1)  # (N, B, C, F, h, w)
    steps = levels(SAMPLING)
    references = given["reference"], want[0][:, :, :1]
    with gradients():
        known = known_of(model, given, references, [int(block >= REANCHOR) for block in range(BLOCKS)])
        latents = given["noise"].transpose(0, 1)
        for step, level in enumerate(steps[:-1]):
            distances = [reference_distance(SAMPLING, block, step) for block in range(BLOCKS)]
            table = references_factors(GEOMETRY, CONFIG.head_dim, 0, distances)
            flow = velocities(model, known, latents, waves(timestep(level), CONFIG.freq_dim), table)
            latents = euler(latents, flow, step, steps)
    # float32 sums in another order: batches of clips, keys side by side instead of in a ring
    torch.testing.assert_close(latents, want, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter_and_the_past(model, given):
    model.requires_grad_(True)
    noise = [block.clone().requires_grad_() for block in given["noise"].unbind(1)]
    table = references_factors(GEOMETRY, CONFIG.head_dim, 0, [9] * BLOCKS)
    with gradients():
        known = known_of(model, given, (given["reference"],), [0] * BLOCKS)
        flow = velocities(model, known, torch.stack(noise), waves(600.0, CONFIG.freq_dim), table)
        flow[4].square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.requires_grad_(False).zero_grad()
    assert [n for n in silent if not n.startswith("cond_encoder.weight")] == []
    # block 4 sees 1..4 directly, and block 0 through what they were
    assert all(block.grad is not None and block.grad.any() for block in noise[:5]) and not noise[5].grad.any()
