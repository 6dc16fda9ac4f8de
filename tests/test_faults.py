"""Whatever breaks, wherever: the others stop, the error says where, finished blocks stay, and the next run is equal."""

import gc
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest
import torch

from liveavatar_core.config import ModelConfig, SamplingConfig
from liveavatar_core.errors import Cancelled, LiveAvatarError, StageError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.links import Lane, Mark
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.plan import PREFILL, Plan, choose
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.pipeline.worker import Waiting, Worker
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning, Payload

CONFIG = ModelConfig(
    dim=16,
    heads=2,
    ffn_dim=16,
    layers=3,
    audio_layers=(0, 2),
    audio_dim=4,
    audio_states=2,
    text_dim=8,
    text_len=4,
    freq_dim=8,
)
GEOMETRY = Geometry(64, 64)
SAMPLING = SamplingConfig(steps=2, seed=11, reanchor_block=2)
BLOCKS = 5
SEEDS = 50
PLANS = [
    choose(name, SAMPLING.steps, CONFIG.layers, ["cpu"] * count)
    for name, count in (("single", 1), ("tpp", 2), ("ring", 2), ("ring", 3), ("2x2", 4))
]


class Touched:
    """A stage to which something is done before a certain hop. Everything else is the real stage."""

    def __init__(self, stage: Stage, touch: Callable[[Payload], None]) -> None:
        self._stage, self._touch = stage, touch

    def __getattr__(self, name: str):
        return getattr(self._stage, name)

    def run(self, payload: Payload) -> Payload:
        self._touch(payload)
        return self._stage.run(payload)


@pytest.fixture(scope="module")
def parts() -> dict[range, CausalDiT]:
    torch.manual_seed(3)
    model = CausalDiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    parts = {}
    for layers in {spec.layers for plan in PLANS for spec in plan.stages}:
        parts[layers] = CausalDiT(CONFIG, layers).eval()
        names = parts[layers].state_dict().keys()
        parts[layers].load_state_dict({name: x for name, x in model.state_dict().items() if name in names})
    return parts


@pytest.fixture(scope="module")
def inputs() -> tuple[Conditioning, list[BlockRequest]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    conditioning = Conditioning(draw(3, 8), draw(16, 1, *size), draw(16, 19, *size))
    return conditioning, [BlockRequest(n, draw(1, CONFIG.audio_states, CONFIG.audio_dim, 12)) for n in range(BLOCKS)]


def run(
    plan: Plan,
    parts: dict[range, CausalDiT],
    inputs: tuple[Conditioning, list[BlockRequest]],
    *,
    touch: dict[int, Callable[[Payload], None]] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[list[torch.Tensor], LiveAvatarError | None]:
    """The latents there were, and the error that ended the stream. `touch`: stage -> what is done before its hops."""
    conditioning, requests = inputs
    latents = []
    with torch.inference_mode():
        stages = [
            Stage(spec, parts[spec.layers], GEOMETRY, SAMPLING, levels(SAMPLING), conditioning.text)
            for spec in plan.stages
        ]
        for index, change in (touch or {}).items():
            stages[index] = Touched(stages[index], change)
        try:
            with ThreadedPipeline(plan, stages) as pipeline:
                stream = denoise(
                    pipeline,
                    conditioning,
                    SAMPLING,
                    requests.__getitem__,
                    BLOCKS,
                    depth=len(stages) + 1,
                    should_stop=should_stop,
                )
                with closing(stream):
                    for _, latent in stream:
                        latents.append(latent)
        except LiveAvatarError as error:
            return latents, error
    return latents, None


@pytest.fixture(scope="module")
def want(parts, inputs) -> list[torch.Tensor]:
    return run(PLANS[0], parts, inputs)[0]


def held() -> tuple[list[str], int, int]:
    """Names of our threads, open handles, bytes of all tensors."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("liveavatar")]
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return threads, handles, sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def some_hop(draw: random.Random, plan: Plan) -> tuple[int, int, int]:
    """Stage, block and step of a hop, prefills among them."""
    stage = draw.choice(plan.stages)
    if draw.random() < 0.15:
        return stage.index, PREFILL, PREFILL
    return stage.index, draw.randrange(BLOCKS), draw.choice(stage.steps)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}-{len(plan.stages)}")
def test_a_stage_that_fails_anywhere(parts, inputs, want, plan):
    run(plan, parts, inputs)
    before = held()
    for seed in range(SEEDS // len(PLANS)):
        draw = random.Random(f"{plan.name} {seed}")
        stage, block, step = some_hop(draw, plan)
        error = draw.choice((RuntimeError("broken"), torch.OutOfMemoryError("out of memory"), MemoryError()))

        def fail(payload: Payload, at=(block, step), error=error) -> None:
            if (payload.block, payload.step) == at:
                raise error

        latents, raised = run(plan, parts, inputs, touch={stage: fail})
        assert isinstance(raised, StageError), f"seed {seed}"
        assert (raised.stage, raised.block, raised.step) == (stage, block, step)
        assert all(torch.equal(a, b) for a, b in zip(latents, want, strict=False)), f"seed {seed}"
        assert len(latents) <= max(0, block) or block == PREFILL
        del latents, raised, error, fail
    assert held() == before
    again, error = run(plan, parts, inputs)
    assert error is None and all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.name}-{len(plan.stages)}")
def test_a_cancel_at_any_hop(parts, inputs, want, plan):
    run(plan, parts, inputs)
    before = held()
    for seed in range(SEEDS // len(PLANS)):
        draw = random.Random(f"{plan.name} {seed}")
        stage, block, step = some_hop(draw, plan)
        stopped = threading.Event()

        def stop(payload: Payload, at=(block, step), stopped=stopped) -> None:
            if (payload.block, payload.step) == at:
                stopped.set()

        latents, raised = run(plan, parts, inputs, touch={stage: stop}, should_stop=stopped.is_set)
        assert isinstance(raised, Cancelled) or len(latents) == BLOCKS, f"seed {seed}"
        assert all(torch.equal(a, b) for a, b in zip(latents, want, strict=False)), f"seed {seed}"
        del latents, raised
    assert held() == before
    again, error = run(plan, parts, inputs)
    assert error is None and all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


def test_blocks_finished_before_a_failure_are_delivered(parts, inputs, want):
    """The very last hop fails, and nobody has asked for the blocks before it yet."""
    plan = PLANS[3]
    conditioning, requests = inputs
    failed = threading.Event()

    def fail(payload: Payload) -> None:
        if (payload.block, payload.step) == (BLOCKS - 1, SAMPLING.steps - 1):
            failed.set()
            raise RuntimeError("broken")

    got = []
    with torch.inference_mode():
        stages = [
            Stage(spec, parts[spec.layers], GEOMETRY, SAMPLING, levels(SAMPLING), conditioning.text)
            for spec in plan.stages
        ]
        stages[-1] = Touched(stages[-1], fail)
        with ThreadedPipeline(plan, stages) as pipeline:
            pipeline.prefill(0, conditioning.reference, conditioning.motion)
            for request in requests:
                pipeline.submit(request)
            assert failed.wait(60)
            with pytest.raises(StageError, match="stage 2 failed at block 4, step 1: broken"):
                while True:
                    result = pipeline.result(0.1)
                    if result is not None:
                        got.append(result[1])
    assert len(got) == BLOCKS - 1
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), "later ones saw no second sink"


def test_the_end_does_not_wait_for_a_stage_that_hangs(parts, inputs, caplog):
    plan, release = PLANS[2], threading.Event()
    stopped = threading.Event()

    def hang(payload: Payload) -> None:
        if payload.block == 1:
            stopped.set()
            release.wait(60)

    _, error = run(plan, parts, inputs, touch={1: hang}, should_stop=stopped.is_set)
    assert isinstance(error, Cancelled)
    assert "stage 1 is still in the middle of a hop" in caplog.text
    threads = held()[0]
    assert run(plan, parts, inputs)[1] is None, "a hung thread is nobody else's"
    assert len(held()[0]) == len(threads) + 1
    release.set()


class Lost(Mark):
    """A copy that never arrives."""

    @property
    def passed(self) -> bool:
        return False


def worker_of(parts, inputs) -> Worker:
    """Of a stage in the middle of a ring that nothing else is connected to."""
    spec = PLANS[3].stages[1]
    with torch.inference_mode():
        stage = Stage(spec, parts[spec.layers], GEOMETRY, SAMPLING, levels(SAMPLING), inputs[0].text)
    return Worker(
        stage,
        Lane(torch.device("cpu")),
        Monitor(),
        threading.Condition(),
        has_room=lambda payload: True,
        pass_on=lambda payload, computed, expected: None,
    )


class Late(Mark):
    """A copy that arrives after a while."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._there = time.perf_counter() + seconds

    @property
    def passed(self) -> bool:
        return time.perf_counter() >= self._there


def test_no_block_overtakes_an_older_one_at_its_step(parts, inputs):
    """However wrong the estimates are: the older one was due long ago, the younger one is there."""
    worker = worker_of(parts, inputs)
    worker.stage._sinks[0] = {}
    for block, arrived in ((6, Late(0.2)), (7, Mark())):
        worker.put(Waiting(Payload(block=block, step=1, sink=0), 0, arrived, 0.0))
    assert [worker._take().payload.block for _ in range(2)] == [6, 7]


def test_a_link_that_stalls_is_named(parts, inputs):
    worker = worker_of(parts, inputs)
    worker.put(Waiting(Payload(block=7, step=1, sink=0), 0, Lost(), 0.0))
    worker.check_time(limit=1000.0)
    with pytest.raises(StageError, match="stage 1 failed at block 7, step 1: what it works on has not arrived within"):
        worker.check_time(limit=0.0)
