"""Which hop comes next, and the time line that this gives when nothing is ever late. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf as NEVER

from liveavatar_core.pipeline.monitor import Span
from liveavatar_core.pipeline.plan import PREFILL, Plan, StageSpec

LEAD = 0.01  # seconds before a device is done with one hop that it is given the next
PATIENCE = 0.1  # of a hop: how long a device may stay idle for an older block that is on its way


def pick(expected: Sequence[tuple[int, float]], now: float, free: float, patience: float) -> tuple[int | None, float]:
    """Which of the payloads, given as (block, when it will be there), comes next, or None and when to look again.

    The oldest of those that keep a device, which is done with everything else at `free`, waiting no longer than
    `patience` beyond the earliest. Decided no sooner than LEAD before it can begin: an older one may still turn up.
    """
    begin = max(free, min(when for _, when in expected))
    if begin - now > LEAD:
        return None, begin - LEAD
    timely = [i for i, (_, when) in enumerate(expected) if when <= begin + patience]
    return min(timely, key=lambda i: expected[i][0]), now


def in_order(waiting: Sequence[tuple[int, int]], apart: int = 0, came_round: int = -1) -> list[int]:
    """Which of a stage's payloads, given as (block, step), may come next, whatever is expected of them.

    The oldest of each step, since caches take blocks in order. Of the first `apart` blocks (as in Plan) those may begin
    whose predecessor has; `came_round` is the youngest block that has been at the stage twice.
    """
    oldest: dict[int, int] = {}
    for block, step in waiting:
        oldest[step] = min(block, oldest.get(step, block))
    return [
        i
        for i, (block, step) in enumerate(waiting)
        if block == oldest[step] and not (step == 0 and came_round + 1 < block < apart)
    ]


@dataclass(frozen=True, slots=True)
class _Item:
    there: float  # when it can be worked on
    block: int
    step: int
    sink: int


def ideal(
    plan: Plan,
    hop: Callable[[StageSpec, int], float],
    blocks: int,
    *,
    depth: int,
    copy: float = 0.0,
    decode: float = 0.0,
    reanchor: int | None = None,
) -> list[Span]:
    """Spans of a stream of `blocks` blocks, `depth` of them in flight, from time 0.

    `hop(stage, step)`: seconds of one hop, with step PREFILL for a sink version; `copy`: seconds of the way from stage
    to stage; `decode`: seconds of the decoder, which has a device to itself and the row after the last stage's.
    """
    waiting: list[list[_Item]] = [[] for _ in plan.stages]
    sinks: list[dict[int, float]] = [{} for _ in plan.stages]  # version -> when it is there
    free = [0.0] * len(plan.stages)
    decoded, admitted, came_round, spans = 0.0, 0, -1, []

    def prefill(version: int, when: float) -> None:
        for row in plan.rows:
            waiting[row[0].index].append(_Item(when, PREFILL, PREFILL, version))

    def admit(when: float) -> None:
        nonlocal admitted
        if admitted < blocks:
            sink = int(reanchor is not None and admitted >= reanchor)
            waiting[plan.rows[0][0].index].append(_Item(when, admitted, 0, sink))
            admitted += 1

    def ready(stage: int, item: _Item) -> float:
        sink = 0.0 if item.step == PREFILL else sinks[stage].get(item.sink, NEVER)
        return max(item.there, sink)

    def candidates(stage: int) -> list[_Item]:
        items = waiting[stage]
        known = [(item.block, item.step) for item in items]
        return [items[i] for i in in_order(known, *((plan.apart, came_round) if stage == 0 else ()))]

    prefill(0, 0.0)
    for _ in range(depth):
        admit(0.0)
    while any(waiting):
        # The earliest hop of all cannot be disturbed by one that is not known yet.
        now, index = min((max(free[i], ready(i, item)), i) for i in range(len(waiting)) for item in candidates(i))
        stage, items = plan.stages[index], candidates(index)
        known = [(item.block, ready(index, item)) for item in items]
        item = items[pick(known, now, free[index], PATIENCE * hop(stage, stage.steps.start))[0]]
        waiting[index].remove(item)
        begin = max(now, ready(index, item))
        if index == 0 and item.step == 1:
            came_round = item.block
        end = free[index] = begin + hop(stage, item.step)
        spans.append(Span(index, "compute", item.block, item.step, begin, end))
        if item.step == PREFILL:
            sinks[index][item.sink] = end
        last = stage.column + 1 == len(plan.rows[stage.row])
        step = item.step + (last and item.step != PREFILL)
        target = plan.next_stage(stage, step)
        if target is not None:
            there = end + (copy if target.index != index else 0.0)
            waiting[target.index].append(_Item(there, item.block, step, item.sink))
        elif item.step != PREFILL:
            decoded = max(decoded, end) + decode
            spans.append(Span(len(plan.stages), "compute", item.block, 0, decoded - decode, decoded))
            admit(end)
            if item.block == 0 and reanchor is not None and reanchor < blocks:
                prefill(1, end)
    return spans
