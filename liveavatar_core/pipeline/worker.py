"""One stage at work: what waits for it, which hop comes next, and what was seen of each.

The same in a thread of this process and in an actor of another. The order of hops follows the devices' time, not the
host's: with CUDA graphs the host would send one block round the whole ring before it looks at the next.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from traceback import clear_frames

import torch

from liveavatar_core.errors import StageError
from liveavatar_core.pipeline.links import Lane, Mark
from liveavatar_core.pipeline.monitor import Monitor, Span
from liveavatar_core.pipeline.plan import PREFILL
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.timetable import NEVER, PATIENCE, in_order, pick
from liveavatar_core.types import Payload

POLL = 0.0005  # seconds between two looks at a device whose time is not known
LOOK = 0.002  # and at one whose time is: it may be done sooner, for what slowed the hop before has passed
AHEAD = 2  # hops a device may have been given: one that runs, one behind it

At = tuple[int, int]  # block, step


@dataclass(slots=True, eq=False)
class Waiting:
    """A payload on its way to a stage, or there."""

    payload: Payload
    sender: int | None  # index of the stage it comes from; None: the driver, or this stage itself
    arrived: Mark
    due: float  # when it is expected; NEVER if nobody knows
    since: float = field(default_factory=time.perf_counter)  # when it was sent

    def expected(self, now: float, patience: float) -> float:
        """When it will be there; an estimate that has long been wrong is none."""
        if self.arrived.passed:
            return now
        return max(now, self.due) if now <= self.due + patience else NEVER


@dataclass(slots=True)
class _Given:
    """A hop that the device has been given and has not finished."""

    at: At
    begin: Mark
    end: Mark
    host: float
    due: float
    seconds: float  # expected; NEVER if nobody knows
    since: float  # when it was given


class Worker:
    """Runs one stage until it is closed or fails."""

    def __init__(
        self,
        stage: Stage,
        lane: Lane,
        monitor: Monitor,
        changed: threading.Condition,
        has_room: Callable[[Payload], bool],
        pass_on: Callable[[Payload, Mark, float], None],
        apart: int = 0,
    ) -> None:
        """`changed` guards what is waiting, here and where `has_room(payload)` looks: whether the next stage can take
        what becomes of a payload. `pass_on(payload, computed, expected)` sends a result on its way, which exists once
        `computed` has passed; that is expected at `expected`. `apart` as in Plan, for its first stage.
        """
        self.stage, self.lane = stage, lane
        self._monitor, self._changed, self._has_room, self._pass_on = monitor, changed, has_room, pass_on
        self._apart, self._came_round = apart, -1  # the youngest block that has been here a second time
        self.waiting: list[Waiting] = []  # guarded by `changed`
        self.closed = False  # likewise
        self._given: deque[_Given] = deque()
        self._copies: deque[tuple[At, Mark, Mark]] = deque()
        self._seconds: dict[bool, float] = {}  # of the latest prefill, of the latest hop
        self._free = 0.0  # when the device was last seen to finish something
        self.at = PREFILL, PREFILL  # block and step of what it was last given

    def put(self, item: Waiting) -> None:
        with self._changed:
            if not self.closed:
                self.waiting.append(item)
                self._changed.notify_all()

    def close(self) -> None:
        """Take nothing more."""
        with self._changed:
            self.closed = True
            self.waiting.clear()
            self._changed.notify_all()

    def work(self) -> None:
        """Until closed. Raises StageError with the original error as its cause."""
        try:
            with torch.inference_mode(), self.lane.active():
                while (item := self._take()) is not None:
                    self._run(item)
                    item = None  # nothing is kept alive while there is nothing to do
        except StageError:
            raise
        except Exception as error:  # a border: whatever it is, the driver must hear of it
            raise self._named(error, self.at) from error

    def _named(self, error: Exception, at: At) -> StageError:
        clear_frames(error.__traceback__)  # they hold tensors
        return StageError(self.stage.spec.index, *at, str(error) or repr(error))

    def copied(self, payload: Payload, begin: Mark, end: Mark) -> None:
        """What became of a hop is being copied to another device; for the monitor."""
        self._copies.append(((payload.block, payload.step), begin, end))

    def _take(self) -> Waiting | None:
        """The next hop's payload, once it is time to give it to the device; None once closed."""
        with self._changed:
            while not self.closed:
                self.settle()
                wake = None
                candidates = [w for w in self._in_order() if self.stage.ready(w.payload) and self._has_room(w.payload)]
                if candidates and len(self._given) < AHEAD:
                    now = time.perf_counter()
                    patience = PATIENCE * self._seconds.get(False, 0.0)
                    expected = [(w.payload.block, w.expected(now, patience)) for w in candidates]
                    chosen, wake = pick(expected, now, self._free_at(now), patience)
                    if chosen is not None:
                        self.waiting.remove(candidates[chosen])
                        self._changed.notify_all()  # there is room for another
                        return candidates[chosen]
                    wake = POLL if wake == NEVER else min(max(POLL, wake - now), LOOK)
                elif candidates:
                    wake = LOOK
                self._changed.wait(wake)
        return None

    def _in_order(self) -> list[Waiting]:
        """What may come next. None can overtake on its way, but estimates can be wrong about which is there first."""
        at = [(item.payload.block, item.payload.step) for item in self.waiting]
        return [self.waiting[i] for i in in_order(at, self._apart, self._came_round)]

    def _free_at(self, now: float) -> float:
        """When the device will have finished all it was given."""
        free = self._free
        for hop in tuple(self._given):  # the driver takes note of finished ones meanwhile
            free = max(free, hop.due) + hop.seconds
        return max(now, free) if self._given else now

    def _run(self, item: Waiting) -> None:
        payload = item.payload
        self.at = payload.block, payload.step
        now = time.perf_counter()
        seconds = self._seconds.get(payload.step == PREFILL, NEVER)
        due = now if item.arrived.passed else item.due
        expected = max(self._free_at(now), due) + seconds
        self.lane.follow(item.arrived)
        if payload.step == 1:
            self._came_round = payload.block
        begin = self.lane.mark()
        done = self.stage.run(payload)
        end = self.lane.mark()
        host = time.perf_counter() - now
        self._given.append(_Given(self.at, begin, end, host, due, seconds, now))
        self._pass_on(done, end, expected)

    def settle(self) -> None:
        """Take note of all that the device has finished meanwhile; hold `changed`. Raises StageError."""
        while self._given and self._passed(self._given[0].end, self._given[0].at):
            hop = self._given.popleft()
            self._free = hop.end.time
            span = self._span("compute", hop.at, hop.begin, hop.end, hop.host)
            self._seconds[span.step == PREFILL] = span.seconds
            self._monitor.add(span)
        while self._copies and self._passed(self._copies[0][2], self._copies[0][0]):
            self._monitor.add(self._span("copy", *self._copies.popleft()))

    def _passed(self, mark: Mark, at: At) -> bool:
        """Errors of a device show up whenever it is asked."""
        try:
            return mark.passed
        except RuntimeError as error:
            raise self._named(error, at) from error

    def check_time(self, limit: float) -> None:
        """Raise StageError if something that moves by itself, device or link, has not moved for `limit` seconds."""
        now = time.perf_counter()
        for hop in list(self._given):
            if now - hop.since > limit:
                reason = f"the device has not finished within {limit:g} s"
                raise StageError(self.stage.spec.index, *hop.at, reason)
        for item in self.waiting:
            if now - item.since > limit and not item.arrived.passed:
                reason = f"what it works on has not arrived within {limit:g} s"
                raise StageError(self.stage.spec.index, item.payload.block, item.payload.step, reason)

    def _span(self, kind: str, at: At, begin: Mark, end: Mark, host: float = 0.0) -> Span:
        return Span(self.stage.spec.index, kind, *at, begin.time, end.time, host)
