"""What a stream leaves behind: nothing, at once. Its caches are most of a card, and the next node may need them."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_dit
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.plan import single
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.runtime.process import StageProcess
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning

GEOMETRY = Geometry(64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    files = DemoFiles(tmp_path_factory.mktemp("demo"))
    write_dit(files, seed=0)
    return ModelSpec(files.single_file)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref]]:
    """All that were made, while nothing collects garbage."""
    made, begin = [], Stage.__init__

    def note(self, *arguments, **named) -> None:
        made.append(weakref.ref(self))
        begin(self, *arguments, **named)

    monkeypatch.setattr(Stage, "__init__", note)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def blocks_of(
    model: ModelSpec, devices: int, broken: int | None = None, runtime: Runtime | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    runtime = runtime or Runtime()
    plan = runtime.ensure(model, DEMO_CONFIG, RuntimeSpec(("cpu",) * devices, precision="fp32"), 4)
    latent = (16, GEOMETRY.latent_height, GEOMETRY.latent_width)
    conditioning = Conditioning(
        torch.zeros(3, DEMO_CONFIG.text_dim), torch.zeros(16, 1, *latent[1:]), torch.zeros(16, 19, *latent[1:])
    )

    def request(block: int) -> BlockRequest:
        if block == broken:
            raise RuntimeError("the sound is over")
        return BlockRequest(block, torch.zeros(1, DEMO_CONFIG.audio_states, DEMO_CONFIG.audio_dim, 12))

    return runtime.latents(plan, GEOMETRY, SamplingConfig(), conditioning, request, 3, lambda: False)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("pulled", [1, 3])
def test_stages_are_gone_when_the_stream_is(model, stages, devices: int, pulled: int) -> None:
    with closing(blocks_of(model, devices)) as latents:
        for _ in range(pulled):
            next(latents)
    assert stages and not [stage for stage in stages if stage() is not None]


def test_stages_are_gone_when_the_stream_failed(model, stages) -> None:
    try:
        list(blocks_of(model, 1, broken=2))
    except RuntimeError:
        pass
    else:
        raise AssertionError("it did not fail")
    assert stages and not [stage for stage in stages if stage() is not None]


def test_the_next_stream_waits_for_a_stage_in_the_middle_of_a_hop(model, monkeypatch) -> None:
    """The model's buffers and host memory are one stream's at a time, however long a hop takes."""
    runtime, entered, release, run = Runtime(), threading.Event(), threading.Event(), Stage.run

    def slow(self, payload):
        if payload.block == 1:
            entered.set()
            release.wait(60)
        return run(self, payload)

    monkeypatch.setattr(Stage, "run", slow)
    with closing(blocks_of(model, 1, runtime=runtime)) as latents:
        next(latents)
        assert entered.wait(60)
    assert not runtime._last.ended(0)
    threading.Timer(0.5, release.set).start()
    again = blocks_of(model, 1, runtime=runtime)
    assert runtime._last.ended(0)
    assert len(list(again)) == 3


def test_a_process_has_room_for_one_stream(model, monkeypatch, stages) -> None:
    process, alive, begin = StageProcess(), [], Stage.__init__

    def count(self, *arguments, **named) -> None:
        alive.append([stage for stage in stages if stage() is not None])
        begin(self, *arguments, **named)

    monkeypatch.setattr(Stage, "__init__", count)
    plan = single(4, DEMO_CONFIG.layers, ["cpu"])
    process.load(model, DEMO_CONFIG, plan.stages[0], "fp32")
    sampling, text, numbers = SamplingConfig(), torch.zeros(3, DEMO_CONFIG.text_dim), []
    for _ in range(2):
        numbers.append(process.begin(plan, 0, GEOMETRY, sampling, levels(sampling), text))
        assert process.end()
    assert alive == [[], []] and numbers[0] < numbers[1]
