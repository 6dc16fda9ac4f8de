"""Figures that follow from spans, and the picture of a time line."""

import time

import pytest

from liveavatar_core.pipeline.monitor import DECODER, Gauges, Monitor, Span
from liveavatar_core.pipeline.plan import PREFILL, choose
from liveavatar_core.pipeline.timeline import LABEL, MARGIN, ROW, SINK, STEPS, WIDTH, Timeline, steady

PLAN = choose("ring", 2, 4, ["cpu"] * 2)


def busy_ring(begin: float, blocks: int, hop: float = 0.1) -> Monitor:
    """Two stages that are each at work half of the time, and blocks decoded as soon as they are finished."""
    monitor = Monitor()
    now = begin
    for block in range(blocks):
        for step in range(2):
            for stage in range(2):
                monitor.add(Span(stage, "compute", block, step, now, now + hop, host=hop / 10))
                monitor.add(Span(stage, "copy", block, step, now + hop, now + 1.1 * hop))
                now += hop
        monitor.finished(block, now)
        monitor.add(Span(DECODER, "compute", block, 0, now, now + hop / 2))
    return monitor


def test_a_snapshot_says_how_stages_fare():
    begin = time.perf_counter() - 4.0
    monitor = busy_ring(begin, 10)
    monitor.watch(lambda: Gauges([3, 0], {"cuda:0": 7}))
    seen = monitor.snapshot()
    assert seen.blocks == 10 and seen.memory == {"cuda:0": 7}
    assert seen.fps == pytest.approx(12 / 0.4)
    first, second = seen.stages
    assert (first.waiting, second.waiting) == (3, 0)
    assert first.hop_ms == pytest.approx(100) and first.wait_ms == pytest.approx(100)
    assert first.copy_ms == pytest.approx(10) and first.host_ms == pytest.approx(10)
    assert 0.4 < first.busy < 0.51, "half of the time, but for the moment since the end"


def test_only_the_last_seconds_count():
    old = busy_ring(time.perf_counter() - 100, 10)
    assert old.snapshot().fps == pytest.approx(12 / 0.4), "it is over, so its end counts"
    old.watch(lambda: Gauges([0, 0]))
    seen = old.snapshot()
    assert seen.blocks == 10 and seen.fps is None and all(stage.busy == 0 for stage in seen.stages)


def test_slow_blocks_have_a_rate():
    monitor = Monitor()
    for block in range(6):
        monitor.finished(block, time.perf_counter() - 20 * (6 - block))
    monitor.watch(lambda: Gauges([0]))
    assert monitor.snapshot().fps == pytest.approx(12 / 20)


def test_nothing_yet():
    seen = Monitor().snapshot()
    assert (seen.blocks, seen.late, seen.fps, seen.stages) == (0, 0, None, ())


def test_blocks_that_come_after_their_time_are_late():
    """Block 0 shows 9 frames, every other one 12: at 25 a second block n is due 0.36 + 0.48 (n - 1) s after block 0."""
    monitor = Monitor(fps=25)
    for block, when in enumerate((0.0, 0.35, 0.83, 1.33, 1.81)):
        monitor.finished(block, 100 + when)
    assert monitor.late == [3, 4]
    monitor.decoded(0)
    assert monitor.late == [] and [block for block, _ in monitor.blocks] == [0], "frames count, not latents"


@pytest.mark.parametrize("rested", [False, True])
def test_a_rest_counts_neither_as_late_nor_as_slow(rested):
    monitor = Monitor(fps=25)
    for block, when in enumerate((0.0, 0.3, 3.6, 4.0, 4.6)):
        if block == 2 and rested:
            monitor.rested(100.3, 103.3)
        monitor.finished(block, 100 + when)
        monitor.add(Span(0, "compute", block, 0, 100 + when - 0.1, 100 + when))
    seen = monitor.snapshot()
    assert monitor.late == ([] if rested else [2, 3, 4]) and seen.late == len(monitor.late)
    assert seen.fps == pytest.approx(48 / (1.6 if rested else 4.6))


def test_new_spans_are_told_once():
    monitor = busy_ring(0.0, 2)
    count, spans = monitor.since(0)
    assert count == len(spans) == 18 and spans == monitor.spans
    monitor.decoded(2)
    assert monitor.since(count) == (19, monitor.spans[-1:])
    assert monitor.since(19) == (19, [])


def test_the_decoder_works_on_a_block_once_it_has_it_and_is_done_with_others():
    monitor = Monitor()
    monitor.finished(0, time.perf_counter() - 2)
    monitor.decoded(0)
    monitor.finished(1, time.perf_counter() - 1)
    monitor.decoded(1)
    monitor.finished(2, time.perf_counter())
    rest = time.perf_counter() + 1
    monitor.rested(rest - 1, rest)
    monitor.decoded(2)
    first, second, third = monitor.spans
    assert first.seconds == pytest.approx(2, abs=0.5) and second.begin == first.end
    assert third.begin == third.end, "not before the rest was over"


@pytest.fixture
def timeline() -> Timeline:
    monitor = busy_ring(50.0, 6)
    monitor.add(Span(0, "compute", PREFILL, PREFILL, 49.8, 50.0))
    return Timeline.of(monitor, PLAN, "a run", depth=3, reanchor=None)


@pytest.mark.parametrize("decode", [0.05, 1.0])
@pytest.mark.parametrize(("plan", "period"), [("single", 1), ("tpp", 1), ("ring", 2)])
def test_the_ideal_of_a_steady_stream(plan, period, decode):
    """Every stage is busy all the time, or the decoder is."""
    plan = choose(plan, 2, 4, ["cpu"] * 2)
    spans = [Span(stage.index, "compute", 0, 0, 0.0, 0.1) for stage in plan.stages]
    spans.append(Span(DECODER, "compute", 0, 0, 0.2, 0.2 + decode))
    ideal, seconds = steady(plan, spans)
    work = 0.1 * period * len(plan.route()) / len(plan.stages)
    assert seconds == pytest.approx(max(work, period * decode))
    assert len([span for span in ideal if span.stage == len(plan.stages)]) == period
    for stage in plan.stages:
        assert sum(span.seconds for span in ideal if span.stage == stage.index) == pytest.approx(work)
    assert all(0 <= span.begin < seconds for span in ideal)


def test_a_time_line_and_its_ideal(timeline, tmp_path):
    assert timeline.names == ("stage 0", "stage 1", "VAE")
    assert {span.stage for span in timeline.spans} == {0, 1, 2} and DECODER not in timeline.names
    real, ideal = (
        max(s.end for s in spans) - min(s.begin for s in spans) for spans in (timeline.spans, timeline.ideal)
    )
    assert ideal < 0.7 * real, "with three blocks in flight the stages need not wait for each other"
    timeline.write(tmp_path / "run.json")
    assert Timeline.read(tmp_path / "run.json") == timeline


def test_a_picture_shows_hops_where_they_were(timeline):
    pytest.importorskip("PIL")
    picture = timeline.picture()
    assert picture.width == WIDTH
    row = MARGIN + 3  # the first part shows all of the run: sink, then block 0 on stage 0
    begin, end = 49.8, max(span.end for span in timeline.spans)

    def colour(when: float, stage: int) -> str:
        x = LABEL + (when - begin) / (end - begin) * (WIDTH - LABEL - MARGIN)
        return "#{:02x}{:02x}{:02x}".format(*picture.getpixel((round(x), row + stage * (ROW + 10))))

    assert colour(49.81, 0) == SINK
    assert colour(50.01, 0) == STEPS[0] and colour(50.11, 1) == STEPS[0]
    assert colour(50.21, 0) == STEPS[1] and colour(50.11, 0) not in STEPS
