"""The central test: however the grid is cut, whoever is late, the latents are the same bits."""

import random
import time

import pytest
import torch

from liveavatar_core.config import ModelConfig, SamplingConfig
from liveavatar_core.errors import Cancelled, PlanError, StageError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.plan import PREFILL, Plan, grid, layer_ring, single, tpp
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning

CONFIG = ModelConfig(
    dim=64,
    heads=2,
    ffn_dim=96,
    layers=5,
    audio_layers=(0, 2, 4),
    audio_dim=12,
    audio_states=3,
    text_dim=16,
    text_len=8,
    freq_dim=32,
)
GEOMETRY = Geometry(64, 80)
BLOCKS = 12


def random_model() -> CausalDiT:
    torch.manual_seed(3)
    model = CausalDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def part_of(model: CausalDiT, layers: range) -> CausalDiT:
    part = CausalDiT(CONFIG, layers)
    names = part.state_dict().keys()
    part.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    return part.eval()


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    return random_model()


@pytest.fixture(scope="module")
def inputs() -> tuple[Conditioning, list[BlockRequest]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    conditioning = Conditioning(draw(5, 16), draw(16, 1, *size), draw(16, 19, *size))
    requests = [BlockRequest(n, draw(1, CONFIG.audio_states, CONFIG.audio_dim, 12)) for n in range(BLOCKS)]
    return conditioning, requests


class Stalling:
    """A stage that is late now and then. Everything else is the real stage."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage, self._random = stage, random.Random(seed)

    def __getattr__(self, name: str):
        return getattr(self._stage, name)

    def run(self, payload):
        time.sleep(self._random.choice((0, 0, 0.004)))
        return self._stage.run(payload)


def run(
    model: CausalDiT,
    inputs: tuple[Conditioning, list[BlockRequest]],
    plan: Plan,
    sampling: SamplingConfig,
    *,
    depth: int = 1,
    seed: int | None = None,
    monitor: Monitor | None = None,
    **formats: str,
) -> torch.Tensor:
    """All latents of one stream. With a seed, audio comes late and stages stall. `formats`: of attention and cache."""
    conditioning, requests = inputs
    late = random.Random(seed)

    def request(block: int) -> BlockRequest:
        if seed is not None:
            time.sleep(late.choice((0, 0.01)))
        return requests[block]

    with torch.inference_mode():
        stages = [
            Stage(spec, part_of(model, spec.layers), GEOMETRY, sampling, levels(sampling), conditioning.text, **formats)
            for spec in plan.stages
        ]
        if seed is not None:
            stages = [Stalling(stage, seed + stage.spec.index) for stage in stages]
        with ThreadedPipeline(plan, stages, monitor) as pipeline:
            latents = denoise(pipeline, conditioning, sampling, request, len(requests), depth=depth)
            return torch.stack([latent for _, latent in latents])


def plans(steps: int) -> dict[str, tuple[Plan, int]]:
    """Name -> (plan, blocks in flight). Four steps, the published number, meet every cut; others the extremes."""
    layers = CONFIG.layers
    sizes = (2, 3, 4, 5) if steps == 4 else (2, 5)
    cuts = {f"ring({n})": (layer_ring(steps, layers, ["cpu"] * n), n) for n in sizes}
    cuts |= {f"tpp({n})": (tpp(steps, layers, ["cpu"] * n), steps) for n in sizes if n <= steps}
    if steps > 1:
        cuts["2 x 2"] = (grid("2 x 2", steps, layers, [["cpu"] * 2] * 2), 4)
        cuts["uneven"] = (grid("uneven", steps, layers, [["cpu"] * 3, ["cpu"]]), 5)
    if steps == 4:
        cuts |= {f"ring(4), {depth} in flight": (layer_ring(steps, layers, ["cpu"] * 4), depth) for depth in (1, 7)}
    return cuts


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_every_plan_gives_the_same_bits(model, inputs, steps):
    sampling = SamplingConfig(steps=steps, seed=11)
    want = run(model, inputs, single(steps, CONFIG.layers, ["cpu"]), sampling)
    assert torch.isfinite(want).all() and want.std() > 0.1
    for name, (plan, depth) in plans(steps).items():
        got = run(model, inputs, plan, sampling, depth=depth)
        differing = [n for n in range(BLOCKS) if not torch.equal(got[n], want[n])]
        assert not differing, f"{name}, {steps} steps: blocks {differing} differ from the single plan"


@pytest.mark.parametrize(("attention", "kv_cache"), [("int8", "full"), ("exact", "fp8"), ("int8", "fp8")])
def test_every_plan_gives_the_same_bits_in_eight_bits(model, inputs, attention, kv_cache):
    formats = {"attention": attention, "kv_cache": kv_cache}
    sampling, plan = SamplingConfig(seed=11), single(4, CONFIG.layers, ["cpu"])
    exact, want = run(model, inputs, plan, sampling), run(model, inputs, plan, sampling, **formats)
    assert 0 < (want - exact).norm() < 0.05 * exact.norm(), "near the exact one, and not the same"
    for plan in (layer_ring(4, CONFIG.layers, ["cpu"] * 3), tpp(4, CONFIG.layers, ["cpu"] * 4)):
        assert torch.equal(run(model, inputs, plan, sampling, depth=4, **formats), want), plan.name


@pytest.mark.parametrize("seed", range(3))
def test_late_audio_and_stalls_change_nothing(model, inputs, seed):
    sampling = SamplingConfig(seed=11)
    want = run(model, inputs, single(4, CONFIG.layers, ["cpu"]), sampling)
    for plan in (tpp(4, CONFIG.layers, ["cpu"] * 4), layer_ring(4, CONFIG.layers, ["cpu"] * 3)):
        assert torch.equal(run(model, inputs, plan, sampling, depth=4, seed=seed), want), plan.name


def test_the_sink_switch_matters_from_its_block_on(model, inputs):
    plan = single(4, CONFIG.layers, ["cpu"])
    never, at_four, at_one = (
        run(model, inputs, plan, SamplingConfig(seed=11, reanchor_block=block)) for block in (None, 4, 1)
    )
    assert torch.equal(never[:4], at_four[:4]) and not torch.equal(never[4], at_four[4])
    assert torch.equal(never[:1], at_one[:1]) and not torch.equal(never[1], at_one[1])


def test_short_streams_keep_the_first_sink(model, inputs):
    """Four blocks are one clip; the original never re-anchors within it."""
    conditioning, requests = inputs
    plan = single(4, CONFIG.layers, ["cpu"])
    short = (conditioning, requests[:4])
    never = run(model, short, plan, SamplingConfig(seed=11, reanchor_block=None))
    assert torch.equal(run(model, short, plan, SamplingConfig(seed=11)), never)


def test_skipping_the_last_step_keeps_the_levels_before_it(model, inputs):
    whole, skipping = SamplingConfig(seed=11), SamplingConfig(seed=11, skip_last_step=True)
    assert levels(skipping) == (*levels(whole)[:3], 0.0) != levels(SamplingConfig(steps=3))
    wants = {}
    for sampling in (whole, skipping):
        wants[sampling] = run(model, inputs, single(sampling.evaluations, CONFIG.layers, ["cpu"]), sampling)
    assert torch.equal(run(model, inputs, tpp(3, CONFIG.layers, ["cpu"] * 3), skipping, depth=3), wants[skipping])
    # Block 0 has no past: its first three velocities are the same, and the step left out covers 0.9 % of the way.
    difference = (wants[whole][0] - wants[skipping][0]).norm() / wants[whole][0].norm()
    assert 0 < difference < 0.05


def test_seed_changes_noise_and_distance(model, inputs):
    plan = single(4, CONFIG.layers, ["cpu"])
    first, second = (run(model, inputs, plan, SamplingConfig(seed=seed)) for seed in (1, 2))
    assert not torch.equal(first[0], second[0])
    fixed, drawn = (run(model, inputs, plan, SamplingConfig(seed=1, distance=d)) for d in (30, None))
    assert torch.equal(fixed[0], drawn[0]), "block 0 sees the reference at 30 whatever the distance"
    assert not torch.equal(fixed[2], drawn[2])


def test_too_many_devices_are_refused_in_one_sentence():
    with pytest.raises(PlanError, match="4 steps cannot be shared by 5 devices"):
        tpp(4, CONFIG.layers, ["cpu"] * 5)


def test_a_failing_stage_names_itself_and_stops_the_others(model, inputs):
    conditioning, requests = inputs
    broken = list(requests)
    broken[3] = BlockRequest(3, torch.zeros(1, CONFIG.audio_states, CONFIG.audio_dim + 1, 12))
    sampling = SamplingConfig(seed=11)
    with pytest.raises(StageError, match=r"stage 0 failed at block 3, step 0"):
        run(model, (conditioning, broken), layer_ring(4, CONFIG.layers, ["cpu"] * 3), sampling, depth=3)


def test_every_hop_leaves_a_span_and_every_block_its_time(model, inputs):
    plan, monitor = layer_ring(4, CONFIG.layers, ["cpu"] * 2), Monitor()
    run(model, inputs, plan, SamplingConfig(seed=11), depth=3, monitor=monitor)
    hops = sorted((s.block, s.step, s.stage) for s in monitor.spans if s.kind == "compute")
    sinks = [(PREFILL, PREFILL, stage) for stage in (0, 0, 1, 1)]
    assert hops == sorted(sinks + [(n, step, stage) for n in range(BLOCKS) for stage, step in plan.route()])
    assert [block for block, _ in monitor.blocks] == list(range(BLOCKS))
    for stage in range(2):
        spans = [s for s in monitor.spans if s.stage == stage and s.kind == "compute"]
        assert all(a.end <= b.begin for a, b in zip(spans, spans[1:], strict=False))


def test_cancel_stops_between_blocks(model, inputs):
    conditioning, requests = inputs
    sampling = SamplingConfig(seed=11)
    plan = tpp(4, CONFIG.layers, ["cpu"] * 4)
    made = []
    with torch.inference_mode():
        stages = [Stage(spec, model, GEOMETRY, sampling, levels(sampling), conditioning.text) for spec in plan.stages]
        with ThreadedPipeline(plan, stages) as pipeline, pytest.raises(Cancelled):
            stream = denoise(
                pipeline,
                conditioning,
                sampling,
                requests.__getitem__,
                BLOCKS,
                depth=4,
                should_stop=lambda: len(made) == 3,
            )
            for block, _ in stream:
                made.append(block)
    assert made == [0, 1, 2]
