"""What a running pipeline did and when: spans of work, finished blocks, and what follows from them.

Writers never wait for readers longer than it takes to copy a list. Seconds are those of time.perf_counter.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_DROPPED, FRAMES_PER_BLOCK

KEPT = 8192  # spans; some ten minutes of four stages
DECODER = -1  # stands where a stage would, for the decoder's spans
WINDOW = 10.0  # seconds that a snapshot looks back
BLOCKS_IN_RATE = 3  # at least, where blocks take longer than that


@dataclass(frozen=True, slots=True)
class Span:
    """`compute`: one hop on a stage's device. `copy`: what it passes on, on its way to the next."""

    stage: int
    kind: str
    block: int
    step: int
    begin: float
    end: float
    host: float = 0.0  # seconds the host spent on it

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Gauges:
    """What only the pipeline can tell, at one moment."""

    waiting: Sequence[int] = ()  # payloads before each stage
    memory: Mapping[str, int] = field(default_factory=dict)  # device -> bytes in use


@dataclass(frozen=True, slots=True)
class StageState:
    """Milliseconds are medians."""

    stage: int
    busy: float  # share of the time
    hop_ms: float
    wait_ms: float  # from the end of a hop to the next one's beginning
    copy_ms: float
    host_ms: float
    waiting: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    blocks: int  # finished so far
    late: int  # of them, after the time at which they should have been on screen
    fps: float | None  # None while there are too few blocks to tell
    stages: tuple[StageState, ...]
    memory: Mapping[str, int]  # device -> bytes in use


class Monitor:
    def __init__(self, fps: float = DEFAULT_FPS) -> None:
        """`fps`: of the video when it is played."""
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=KEPT)
        self._count = 0  # of spans so far, kept or not
        self._finished, self._shown = _Arrivals(fps), _Arrivals(fps)
        self.rests: list[tuple[float, float]] = []  # (begin, end) of times when nobody wanted blocks
        self._gauges: Callable[[], Gauges] = Gauges

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def add(self, span: Span) -> None:
        with self._lock:
            self._append(span)

    def _append(self, span: Span) -> None:
        self._spans.append(span)
        self._count += 1

    def finished(self, block: int, when: float) -> None:
        """A block's latents are there."""
        with self._lock:
            self._finished.add(block, when, self._rest(when))

    def decoded(self, block: int) -> None:
        """A block's frames are there now. The decoder began when it had the block, was done with the one before, and
        nobody rested any more."""
        now = time.perf_counter()
        with self._lock:
            free = max(end for _, end in [*list(self._shown.kept)[-1:], *self.rests[-1:], (0, 0.0)])
            there = next((when for other, when in reversed(self._finished.kept) if other == block), now)
            self._append(Span(DECODER, "compute", block, 0, min(now, max(free, there)), now))
            self._shown.add(block, now, self._rest(now))

    def rested(self, begin: float, end: float) -> None:
        """Nobody wanted blocks meanwhile: rates and the times when blocks are due leave it out."""
        self.rests.append((begin, end))

    def drain(self) -> list[Span]:
        """The spans since the last call, which are forgotten here."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans

    def since(self, count: int) -> tuple[int, list[Span]]:
        """How many spans there have been, and what is kept of those after the first `count`."""
        with self._lock:
            new = islice(reversed(self._spans), max(0, self._count - count))
            return self._count, list(new)[::-1]

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    @property
    def _arrivals(self) -> "_Arrivals":
        """Of frames, or of latents if nobody decodes."""
        return self._shown if self._shown.count else self._finished

    @property
    def blocks(self) -> list[tuple[int, float]]:
        """(block, when its frames were there, or its latents if nobody decodes)"""
        with self._lock:
            return list(self._arrivals.kept)

    @property
    def late(self) -> list[int]:
        """Blocks that came after their time, if the first was played as soon as it was there."""
        with self._lock:
            return list(self._arrivals.late)

    def _rest(self, end: float, begin: float = 0.0) -> float:
        """Seconds of rests in between."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self.rests)

    def snapshot(self) -> Snapshot:
        """Of the last seconds; of those before the end once nothing runs any more."""
        gauges, now = self._gauges(), time.perf_counter()
        with self._lock:
            if self._gauges is Gauges and self._spans:
                now = self._spans[-1].end
            since = now - WINDOW
            # In the order in which they were noted, which is that of their ends, but for moments.
            spans = list(takewhile(lambda span: span.end > since, reversed(self._spans)))[::-1]
            arrivals = self._arrivals
            latest = [when for _, when in islice(reversed(arrivals.kept), 2)]
            gap = latest[0] - latest[-1] if latest else 0.0
            lately = now - max(WINDOW, BLOCKS_IN_RATE * gap)
            recent = [when for _, when in takewhile(lambda block: block[1] > lately, reversed(arrivals.kept))][::-1]
            blocks, late = arrivals.count, arrivals.late_count
        fps = None
        if len(recent) > 1:
            first, last = recent[0], recent[-1]
            fps = FRAMES_PER_BLOCK * (len(recent) - 1) / (last - first - self._rest(last, first))
        begin = max(since, min((span.begin for span in spans), default=now))
        rows = max([len(gauges.waiting), *(span.stage + 1 for span in spans)])
        return Snapshot(
            blocks=blocks,
            late=late,
            fps=fps,
            stages=tuple(
                _state(
                    stage,
                    [span for span in spans if span.stage == stage],
                    begin,
                    now,
                    gauges.waiting[stage] if stage < len(gauges.waiting) else 0,
                )
                for stage in range(rows)
            ),
            memory=gauges.memory,
        )


class _Arrivals:
    """Blocks as they come, and which of them came after their time."""

    def __init__(self, fps: float) -> None:
        self.kept: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self.late: deque[int] = deque(maxlen=KEPT)
        self.count = self.late_count = 0
        self._fps, self._begun = fps, 0.0

    def add(self, block: int, when: float, rest: float) -> None:
        """`rest`: seconds until then in which nobody wanted any."""
        shown = _frame(block) / self._fps  # seconds after the first frame
        if not self.count:
            self._begun = when - rest - shown
        self.kept.append((block, when))
        self.count += 1
        if when - rest > self._begun + shown:
            self.late.append(block)
            self.late_count += 1


def _state(stage: int, spans: Sequence[Span], begin: float, now: float, waiting: int) -> StageState:
    hops = [span for span in spans if span.kind == "compute"]
    busy = sum(span.end - max(span.begin, begin) for span in hops)
    return StageState(
        stage,
        busy / (now - begin) if now > begin else 0.0,
        _median_ms(span.seconds for span in hops),
        _median_ms(b.begin - a.end for a, b in zip(hops, hops[1:], strict=False)),
        _median_ms(span.seconds for span in spans if span.kind == "copy"),
        _median_ms(span.host for span in hops),
        waiting,
    )


def _median_ms(seconds) -> float:
    return round(1000 * statistics.median(list(seconds) or [0.0]), 3)


def _frame(block: int) -> int:
    """First frame of a block; the first block lacks some."""
    return max(0, FRAMES_PER_BLOCK * block - FRAMES_DROPPED)
