"""What a running pipeline did and when: spans of work, finished blocks, and what follows from them.

Writers never wait for readers longer than it takes to copy a list. Seconds are those of time.perf_counter.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_DROPPED, FRAMES_PER_BLOCK

KEPT = 8192  # spans; some ten minutes of four stages
DECODER = -1  # stands where a stage would, for the decoder's spans
WINDOW = 10.0  # seconds that a snapshot looks back


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
        self._fps = fps
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=KEPT)
        self._finished: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self._shown: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self.rests: list[tuple[float, float]] = []  # (begin, end) of times when nobody wanted blocks
        self._gauges: Callable[[], Gauges] = Gauges

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)

    def finished(self, block: int, when: float) -> None:
        """A block's latents are there."""
        with self._lock:
            self._finished.append((block, when))

    def decoded(self, block: int) -> None:
        """A block's frames are there now. The decoder began when it had the block and was done with the one before."""
        now = time.perf_counter()
        with self._lock:
            free = self._shown[-1][1] if self._shown else 0.0
            there = next((when for other, when in reversed(self._finished) if other == block), now)
            self._spans.append(Span(DECODER, "compute", block, 0, min(now, max(free, there)), now))
            self._shown.append((block, now))

    def rested(self, begin: float, end: float) -> None:
        """Nobody wanted blocks meanwhile: rates and the times when blocks are due leave it out."""
        self.rests.append((begin, end))

    def drain(self) -> list[Span]:
        """The spans since the last call, which are forgotten here."""
        with self._lock:
            spans = list(self._spans)
            self._spans.clear()
        return spans

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    @property
    def blocks(self) -> list[tuple[int, float]]:
        """(block, when its frames were there, or its latents if nobody decodes)"""
        with self._lock:
            return list(self._shown or self._finished)

    @property
    def late(self) -> list[int]:
        """Blocks that came after their time, if the first was played as soon as it was there."""
        blocks = self.blocks
        if not blocks:
            return []
        first, begun = blocks[0]
        return [
            block
            for block, when in blocks
            if when - self._rest(begun, when) > begun + (_frame(block) - _frame(first)) / self._fps
        ]

    def _rest(self, begin: float, end: float) -> float:
        """Seconds of rests in between."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self.rests)

    def snapshot(self) -> Snapshot:
        """Of the last seconds; of those before the end once nothing runs any more."""
        gauges, spans, blocks = self._gauges(), self.spans, self.blocks
        now = time.perf_counter()
        if self._gauges is Gauges and spans:
            now = max(span.end for span in spans)
        since = now - WINDOW
        recent = [when for _, when in blocks if when > since]
        fps = None
        if len(recent) > 1:
            first, last = recent[0], recent[-1]
            fps = FRAMES_PER_BLOCK * (len(recent) - 1) / (last - first - self._rest(first, last))
        begin = max(since, min((span.begin for span in spans), default=now))
        count = max([len(gauges.waiting), *(span.stage + 1 for span in spans)])
        recent_spans = [span for span in spans if span.end > begin]
        return Snapshot(
            blocks=len(blocks),
            late=len(self.late),
            fps=fps,
            stages=tuple(
                _state(
                    stage,
                    [span for span in recent_spans if span.stage == stage],
                    begin,
                    now,
                    gauges.waiting[stage] if stage < len(gauges.waiting) else 0,
                )
                for stage in range(count)
            ),
            memory=gauges.memory,
        )


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
