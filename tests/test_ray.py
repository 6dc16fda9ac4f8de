"""Stages as processes of a Ray cluster of this machine: the same bits, and a clear end whatever happens to them."""

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_dit
from liveavatar_core.errors import Cancelled, PlanError, StageError, WeightsError
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.hold import Hold
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import held
from liveavatar_core.runtime import cluster
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.types import BlockRequest, Conditioning, Payload

GEOMETRY = Geometry(64, 64)
SAMPLING = SamplingConfig(seed=3)
BLOCKS = 13  # the sink switches, every slot of the window is used again and again

# A mere folder of that name, as Ray makes in /tmp, has no origin.
no_ray = getattr(find_spec("ray"), "origin", None) is None
needs_ray = pytest.mark.skipif(no_ray, reason="Ray is not installed: pip install ray")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSpec:
    files = DemoFiles(tmp_path_factory.mktemp("demo"))
    write_dit(files, seed=0)
    return ModelSpec(files.shards)


@pytest.fixture(scope="module")
def inputs() -> tuple[Conditioning, list[BlockRequest]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    conditioning = Conditioning(draw(5, DEMO_CONFIG.text_dim), draw(16, 1, *size), draw(16, 19, *size))
    shape = 1, DEMO_CONFIG.audio_states, DEMO_CONFIG.audio_dim, 12
    return conditioning, [BlockRequest(n, draw(*shape)) for n in range(BLOCKS)]


def run(
    runtime: Runtime,
    model: ModelSpec,
    inputs: tuple[Conditioning, list[BlockRequest]],
    spec: RuntimeSpec,
    *,
    after: Callable[[int], None] = lambda block: None,
    should_stop: Callable[[], bool] = lambda: False,
    monitor: Monitor | None = None,
    hold: Hold | None = None,
    late: float = 0.0,
    sampling: SamplingConfig = SAMPLING,
) -> list[torch.Tensor]:
    """All latents. `after(block)` is called when a block is there; audio comes up to `late` seconds late."""
    conditioning, requests = inputs
    monitor = monitor or Monitor()

    def request(block: int) -> BlockRequest:
        time.sleep(random.choice((0, late)))
        return requests[block]

    plan = runtime.ensure(model, DEMO_CONFIG, spec, sampling.evaluations, geometry=GEOMETRY)
    stream = runtime.latents(plan, GEOMETRY, sampling, conditioning, request, len(requests), should_stop, monitor)
    latents = []
    with closing(stream):
        for block, latent in held(stream, hold or Hold(), monitor, len(requests)):
            latents.append(latent)
            after(block)
    return latents


@pytest.fixture(scope="module")
def want(model, inputs) -> list[torch.Tensor]:
    return run(Runtime(), model, inputs, RuntimeSpec(("cpu",)))


@pytest.fixture(scope="module")
def second(inputs) -> tuple[Conditioning, list[BlockRequest]]:
    """Another prompt."""
    conditioning, requests = inputs
    return replace(conditioning, text=-conditioning.text), requests


@pytest.fixture(scope="module")
def second_want(model, second) -> list[torch.Tensor]:
    return run(Runtime(), model, second, RuntimeSpec(("cpu",)))


@pytest.fixture(scope="module")
def runtime():
    os.environ["RAY_worker_niceness"] = "0"  # else whatever else the machine does comes first
    runtime = Runtime()
    yield runtime
    runtime.unload()
    with suppress(ImportError):
        import ray

        ray.shutdown()


def spec_of(plan: str, count: int) -> RuntimeSpec:
    return RuntimeSpec(("cpu",) * count, plan, cluster="local")


def process_ids(runtime: Runtime) -> list[int]:
    import ray

    return ray.get([process.__ray_call__.remote(lambda self: os.getpid()) for process in runtime._cluster.processes])


def stall(runtime: Runtime) -> None:
    """From now on the stages of these processes are late now and then; everything else is the real stage."""
    import ray

    def be_late(process: object, seed: int) -> None:
        draw, on_time = random.Random(seed), Stage.run

        def late(stage: Stage, payload: Payload) -> Payload:
            time.sleep(draw.choice((0, 0, 0.004)))
            return on_time(stage, payload)

        Stage.run = late

    ray.get([process.__ray_call__.remote(be_late, n) for n, process in enumerate(runtime._cluster.processes)])


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want)
    differing = [n for n, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)]
    assert not differing, f"blocks {differing} differ"


@needs_ray
@pytest.mark.parametrize(("count", "plans"), [(2, ("tpp", "ring")), (4, ("tpp", "2x2", "ring")), (3, ("tpp", "ring"))])
def test_processes_give_the_same_bits_stream_after_stream(
    runtime, model, inputs, want, second, second_want, count, plans
):
    """Plan after plan in the same processes; each second stream has another prompt, late audio, stages that stall."""
    before = None
    for plan in plans:
        monitor = Monitor()
        assert_equal(run(runtime, model, inputs, spec_of(plan, count), monitor=monitor), want)
        assert [block for block, _ in monitor.blocks] == list(range(BLOCKS))
        assert {span.stage for span in monitor.spans} == set(range(count))
        if before is None:
            before = process_ids(runtime)
            assert len(set(before)) == count and os.getpid() not in before
            stall(runtime)
        assert_equal(run(runtime, model, second, spec_of(plan, count), late=0.01), second_want)
        assert process_ids(runtime) == before, "the processes stay, and their weights with them"


@needs_ray
@pytest.mark.parametrize(("steps", "plan"), [(1, "ring"), (3, "tpp"), (5, "tpp")])
def test_processes_give_the_same_bits_at_any_number_of_steps(runtime, model, inputs, steps, plan):
    sampling = SamplingConfig(steps=steps, seed=3)
    alone = run(Runtime(), model, inputs, RuntimeSpec(("cpu",)), sampling=sampling)
    assert_equal(run(runtime, model, inputs, spec_of(plan, 3), sampling=sampling), alone)


@needs_ray
def test_a_stage_that_fails_or_a_cancel_ends_the_stream_and_no_process(runtime, model, inputs, want):
    spec = spec_of("ring", 3)
    conditioning, requests = inputs
    broken = list(requests)
    broken[4] = BlockRequest(4, torch.zeros(1, DEMO_CONFIG.audio_states, DEMO_CONFIG.audio_dim + 1, 12))
    with pytest.raises(StageError, match="stage 0 failed at block 4, step 0"):
        run(runtime, model, (conditioning, broken), spec)
    before = process_ids(runtime)
    made = []
    with pytest.raises(Cancelled):
        run(runtime, model, inputs, spec, after=made.append, should_stop=lambda: len(made) == 3)
    assert made == [0, 1, 2]
    assert_equal(run(runtime, model, inputs, spec), want)
    assert process_ids(runtime) == before


@needs_ray
def test_a_pause_may_last_longer_than_a_silence(runtime, model, inputs, want, monkeypatch):
    """Nobody asks the processes anything meanwhile; that does not make them silent."""
    monkeypatch.setattr(cluster, "SILENT", 3.0)
    hold, monitor = Hold(), Monitor()

    def pause(block: int) -> None:
        if block == 2:
            hold.pause()
            threading.Timer(cluster.SILENT + 1, hold.resume).start()

    assert_equal(run(runtime, model, inputs, spec_of("ring", 3), after=pause, hold=hold, monitor=monitor), want)
    ((begin, end),) = monitor.rests
    assert end - begin > cluster.SILENT


def kept() -> tuple[list[str], int, int]:
    """Names of our threads, open handles, bytes of all tensors, in this process."""
    gc.collect()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("liveavatar")]
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return threads, len(os.listdir("/proc/self/fd")), sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@needs_ray
def test_a_process_that_is_killed_is_named_and_the_next_run_works(runtime, model, inputs, want):
    spec = spec_of("ring", 3)
    assert_equal(run(runtime, model, inputs, spec), want)
    before, processes = kept(), process_ids(runtime)
    made, killed = [], []

    def kill(block: int) -> None:
        made.append(block)
        if block == 2:
            os.kill(processes[1], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(StageError, match="stage 1 failed at .*: its process has died"):
        run(runtime, model, inputs, spec, after=kill)
    assert time.monotonic() - killed[0] < 10 and made[:3] == [0, 1, 2]
    assert_equal(run(runtime, model, inputs, spec), want)
    assert kept() == before
    assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")], "the others were ended with it"


@needs_ray
def test_what_a_process_cannot_load_is_said(runtime, model, inputs, want):
    with pytest.raises(WeightsError, match="nowhere"):
        run(runtime, ModelSpec(Path("/nowhere/model")), inputs, spec_of("ring", 3))
    assert_equal(run(runtime, model, inputs, spec_of("ring", 3)), want)


def test_without_ray_one_sentence_says_so(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match="need Ray, which is not installed: pip install ray"):
        Runtime().ensure(model, DEMO_CONFIG, spec_of("ring", 2), 4, geometry=GEOMETRY)
