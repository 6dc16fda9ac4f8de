"""The ideal time line: known rates and latencies of known plans, and the rules that any order must obey."""

import pytest

from liveavatar_core.pipeline.monitor import Span
from liveavatar_core.pipeline.plan import PREFILL, Plan, choose
from liveavatar_core.pipeline.timetable import LEAD, NEVER, ideal, pick

LAYERS, BLOCKS = 8, 64


def spans_of(name: str, count: int, *, depth: int, **details) -> tuple[Plan, list[Span]]:
    """All layers of a step take a second, shared out evenly."""
    plan = choose(name, 4, LAYERS, [f"cuda:{i}" for i in range(count)])
    return plan, ideal(plan, lambda stage, step: len(stage.layers) / LAYERS, BLOCKS, depth=depth, **details)


def finished(plan: Plan, spans: list[Span]) -> list[float]:
    return [span.end for span in spans if span.stage == len(plan.stages)]


@pytest.mark.parametrize(
    ("name", "count", "interval"),
    [("single", 1, 4.0), ("tpp", 2, 2.0), ("tpp", 4, 1.0), ("ring", 2, 2.0), ("ring", 4, 1.0), ("ring", 8, 0.5)],
)
def test_rates_of_known_plans(name, count, interval):
    plan, spans = spans_of(name, count, depth=count + 1)
    times = finished(plan, spans)
    sink = 1.0  # of the prefill, before anything else
    assert times[0] <= 4 + 2 * sink
    assert (times[48] - times[8]) / 40 == pytest.approx(interval, rel=0.05)  # full, and not draining yet


def test_every_order_obeys_the_grid():
    plan, spans = spans_of("2x2", 4, depth=5, copy=0.1, decode=0.3, reanchor=4)
    last: dict[int, float] = {}
    seen: dict[tuple[int, int], list[int]] = {}
    for span in spans:
        assert span.begin >= last.get(span.stage, 0.0), "a device does one thing at a time"
        last[span.stage] = span.end
        if span.stage < len(plan.stages) and span.step != PREFILL:
            seen.setdefault((span.stage, span.step), []).append(span.block)
    assert all(blocks == list(range(BLOCKS)) for blocks in seen.values()), "blocks overtake each other"
    by_hop = {(span.stage, span.block, span.step): span for span in spans if span.step != PREFILL}
    for block in range(BLOCKS):
        hops = [by_hop[stage, block, step] for stage, step in plan.route()]
        for a, b in zip(hops, hops[1:], strict=False):
            assert b.begin >= a.end + (0.1 if a.stage != b.stage else 0.0) - 1e-9
    second = [span.end for span in spans if span.step == PREFILL][len(plan.stages) :]
    assert min(span.begin for span in spans if span.block == 4 and span.stage == 0) >= min(second)


def test_no_more_than_depth_blocks_are_in_flight():
    plan, spans = spans_of("ring", 4, depth=2)
    begun = {span.block: span.begin for span in reversed(spans) if span.block >= 0 and span.stage == 0}
    done = dict(enumerate(finished(plan, spans)))
    assert all(begun[block] >= done[block - 2] for block in range(2, BLOCKS))


def test_blocks_of_a_ring_end_apart():
    """Four laps of a second each: not four blocks within a second and then none for three."""
    for details in ({}, {"reanchor": 4}):
        plan, spans = spans_of("ring", 4, depth=8, **details)
        times = finished(plan, spans)[8:48]
        assert max(b - a for a, b in zip(times, times[1:], strict=False)) < 2


def test_an_older_block_on_its_way_is_waited_for_a_little():
    there, soon, late = (7, 0.0), (5, 1.04), (3, 1.5)
    assert pick([there, soon, late], now=1.0, free=1.0, patience=0.1) == (1, 1.0)
    assert pick([there, soon, late], now=1.0, free=1.0, patience=0.01) == (0, 1.0)
    assert pick([there, soon, late], now=1.0, free=1.45, patience=0.1)[0] is None, "too early to decide"
    assert pick([there, soon, late], now=1.45, free=1.45, patience=0.1) == (2, 1.45)


def test_nothing_is_decided_before_its_time():
    assert pick([(2, 3.0)], now=1.0, free=0.0, patience=0.1) == (None, 3.0 - LEAD)
    assert pick([(2, 3.0)], now=3.0 - LEAD / 2, free=0.0, patience=0.1)[0] == 0
    assert pick([(2, NEVER)], now=1.0, free=0.0, patience=0.1)[0] is None


def test_patience_keeps_a_ring_quick_where_copies_take_time():
    """A copy is a little late for its turn; without patience every block would let two others pass in every step."""
    plan, spans = spans_of("ring", 2, depth=6, copy=0.01)
    begun = {span.block: span.begin for span in reversed(spans) if span.stage == 0 and span.step == 0}
    latencies = [end - begun[block] for block, end in enumerate(finished(plan, spans))]
    assert max(latencies) < 4 + 1
