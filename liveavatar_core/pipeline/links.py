"""How payloads get from one stage's device to the next: streams, copies, and marks that tell when work is done.

Nothing here waits, but for `drain` and a CPU that is to `follow` a GPU. A stage computes on a stream of its own; what
it passes on leaves on a second and arrives on a third, so copies run beside the next computation. On a CPU all of it is
immediate.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from liveavatar_core.types import Payload

CLOCK_IS_RIGHT = 60.0  # seconds; two clocks drift apart, and a device tells long times in few digits

Value = TypeVar("Value")


class Mark:
    """A moment in the order of a stream's work; `passed` once the device has got there."""

    def __init__(self, clock: "_Clock | None" = None, stream: "torch.cuda.Stream | None" = None) -> None:
        self._clock = clock
        self.event = None
        if stream is None:
            self._time = time.perf_counter()
        else:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(stream)

    @property
    def passed(self) -> bool:
        return self.event is None or self.event.query()

    @property
    def time(self) -> float:
        """Seconds of time.perf_counter, on whichever device; only once it has passed."""
        return self._time if self.event is None else self._clock.time_of(self.event)


class _Clock:
    """A device's time in the host's seconds."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _idle_stream(device)
        self._zero = self._set()

    def _set(self) -> tuple[torch.cuda.Event, float]:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        event.synchronize()
        return event, time.perf_counter()

    def time_of(self, event: torch.cuda.Event) -> float:
        if time.perf_counter() - self._zero[1] > CLOCK_IS_RIGHT:
            self._zero = self._set()
        zero, host = self._zero
        return host + zero.elapsed_time(event) / 1000  # below zero for what was before


class Lane:
    """Where one stage's work and its copies run."""

    def __init__(self, device: torch.device, streams: tuple[torch.cuda.Stream, ...] = ()) -> None:
        self.device = device
        self.compute, self.leaving, self.arriving = streams or (None, None, None)
        self._clock = _Clock(device) if streams else None

    def active(self) -> AbstractContextManager:
        """Work of this thread goes here."""
        return nullcontext() if self.compute is None else torch.cuda.stream(self.compute)

    def mark(self, stream: "torch.cuda.Stream | None" = None) -> Mark:
        """After all that `stream` (None: `compute`) has been given so far."""
        return Mark(self._clock, stream or self.compute)

    def follow(self, mark: Mark) -> None:
        """Start nothing more before it has passed. A CPU is held here, a GPU where it gets there."""
        if mark.event is not None:
            mark.event.synchronize() if self.compute is None else self.compute.wait_event(mark.event)

    def follow_caller(self) -> None:
        """Start after what the calling thread has given to its own stream of this device."""
        if self.compute is not None:
            self.compute.wait_stream(torch.cuda.current_stream(self.device))

    def release_to_caller(self) -> None:
        """The calling thread's later work on this device comes after all of ours: memory may change hands."""
        if self.compute is not None:
            for stream in (self.compute, self.leaving, self.arriving):
                torch.cuda.current_stream(self.device).wait_stream(stream)

    def drain(self) -> None:
        """Hold the calling thread until all that `compute` was given is done."""
        if self.compute is not None:
            self.compute.synchronize()


def lanes(devices: Sequence[torch.device]) -> list[Lane]:
    """One per stage; stages of one device run beside each other."""
    taken: Counter[torch.device] = Counter()
    made = []
    for device in devices:
        # A stage that others wait for is as urgent as frames (`encoders.vae`); alone it lets them go first.
        urgency = -1 if len(devices) > 1 else 0
        made.append(Lane(device, _streams(device, taken[device], urgency) if device.type == "cuda" else ()))
        taken[device] += 1
    return made


@cache
def _idle_stream(device: torch.device) -> torch.cuda.Stream:
    """Nothing waits on it, so whatever is recorded there has passed."""
    return torch.cuda.Stream(device)


@cache
def _streams(device: torch.device, number: int, priority: int) -> tuple[torch.cuda.Stream, ...]:
    """The same ones for the life of the process: libraries keep workspaces for every stream they have seen."""
    return tuple(torch.cuda.Stream(device, priority=priority) for _ in range(3))


def each(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """`value` with every tensor in it changed; looks into tuples and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(each(item, change) for item in value)
    if is_dataclass(value):
        changed = {field.name: each(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **changed)
    return value


def carry(payload: Payload, ready: Mark, source: Lane, target: Lane) -> tuple[Payload, Mark, Mark]:
    """(the payload on the target's device, beginning and end of the copy); it begins once `ready` has passed."""
    move, last = _route(source, target)
    if ready.event is not None:
        source.leaving.wait_event(ready.event)
    begin = source.mark(source.leaving)
    carried = each(payload, lambda x: move(x, source, target))
    return carried, begin, last.mark(source.leaving if last is source else target.arriving)


def _route(source: Lane, target: Lane) -> tuple[Callable[[Tensor, Lane, Lane], Tensor], Lane]:
    """How a tensor moves, and on whose stream that ends."""
    kinds = source.device.type, target.device.type
    if kinds == ("cpu", "cpu"):
        return _kept, source
    if kinds == ("cuda", "cpu"):
        return _down, source
    if kinds == ("cpu", "cuda"):
        return _up, target
    if source.device == target.device:
        return _shared, source
    return (_direct, source) if _reaches(source.device, target.device) else (_bounced, target)


@cache
def _reaches(source: torch.device, target: torch.device) -> bool:
    """Whether one card can write into the other's memory. Tried, not only asked: some boards say yes and lose bytes."""
    if not torch.cuda.can_device_access_peer(source, target):
        return False
    sent = torch.arange(2**20, dtype=torch.int32)
    return torch.equal(sent.to(source).to(target).cpu(), sent)


def _kept(x: Tensor, source: Lane, target: Lane) -> Tensor:
    return x


def _shared(x: Tensor, source: Lane, target: Lane) -> Tensor:
    x.record_stream(target.compute)
    return x


def _direct(x: Tensor, source: Lane, target: Lane) -> Tensor:
    x.record_stream(source.leaving)
    # torch copies on the source's current stream, and has it and the target's wait for each other.
    with torch.cuda.stream(target.arriving):
        y = torch.empty_like(x, device=target.device)
        with torch.cuda.stream(source.leaving):
            y.copy_(x, non_blocking=True)
    y.record_stream(target.compute)
    return y


def _down(x: Tensor, source: Lane, target: Lane) -> Tensor:
    x.record_stream(source.leaving)
    with torch.cuda.stream(source.leaving):
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


def _up(x: Tensor, source: Lane, target: Lane) -> Tensor:
    with torch.cuda.stream(target.arriving):
        y = upload(x, target.device)
    y.record_stream(target.compute)
    return y


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a device; from the host's memory without waiting for what the device is doing."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


def _bounced(x: Tensor, source: Lane, target: Lane) -> Tensor:
    """Through pinned memory of the host, where the cards cannot reach each other."""
    host = _down(x, source, target)
    target.arriving.wait_event(source.leaving.record_event())
    return _up(host, source, target)
