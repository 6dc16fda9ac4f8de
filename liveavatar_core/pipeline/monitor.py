"""What a running pipeline did and when: spans of work, finished blocks, and what follows from them.

Writers never wait for readers longer than it takes to copy a list. Seconds are those of time.perf_counter.
"""

import threading
from collections import deque
from dataclasses import dataclass

KEPT = 8192  # spans; some ten minutes of four stages


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


class Monitor:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=KEPT)
        self._finished: deque[tuple[int, float]] = deque(maxlen=KEPT)

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)

    def finished(self, block: int, when: float) -> None:
        """A block's latents are there."""
        with self._lock:
            self._finished.append((block, when))

    @property
    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    @property
    def blocks(self) -> list[tuple[int, float]]:
        """(block, when it was finished)"""
        with self._lock:
            return list(self._finished)
