"""Payloads between processes by torch.distributed: one group per directed link, so that no link waits for another.

A header of fixed size goes ahead over Gloo. The tensors follow over NCCL from GPU to GPU, else through the hosts'
memory. Each end of a link has a thread; links are first in, first out, and end with a word that says so.
"""

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from liveavatar_core.pipeline.links import Lane, Mark, each, upload
from liveavatar_core.pipeline.plan import Plan
from liveavatar_core.pipeline.worker import POLL, Waiting, Worker
from liveavatar_core.types import Payload

HEADER = 16_384  # bytes; a payload without its tensors takes some two thousand
PLACES = 2  # hidden states that may be on their way to one stage
FOREVER = timedelta(days=365)  # a link may have nothing to carry for as long as nobody wants a block


@dataclass(frozen=True, slots=True)
class Link:
    """From one process to another, which are named by their stages' indices."""

    source: int
    target: int
    headers: dist.ProcessGroup
    tensors: dist.ProcessGroup | None  # NCCL; None: through the hosts' memory, over `headers`


def links_of(plan: Plan) -> list[tuple[int, int]]:
    """(from, to) of all stages between which payloads pass, in an order that every process finds."""
    found = set()
    for stage in plan.stages:
        for step in (*stage.steps, stage.steps.stop):
            target = plan.next_stage(stage, step)
            if target is not None and target is not stage:
                found.add((stage.index, target.index))
    return sorted(found)


def open_links(plan: Plan) -> list[Link]:
    """To be called in all processes together, once per plan, after `dist.init_process_group`."""
    links = []
    for source, target in links_of(plan):
        headers = dist.new_group([source, target], backend="gloo", timeout=FOREVER)
        on_cards = all(plan.stages[end].device.startswith("cuda") for end in (source, target))
        tensors = None
        if on_cards and dist.is_nccl_available():
            tensors = dist.new_group([source, target], backend="nccl", timeout=FOREVER)
        links.append(Link(source, target, headers, tensors))
    return links


class Outgoing:
    """The near end of a link: sends what the stage here has made."""

    def __init__(
        self,
        link: Link,
        lane: Lane,
        changed: threading.Condition,
        failed: Callable[[Exception], None],
        copied: Callable[[Payload, Mark, Mark], None],
    ) -> None:
        """`changed` guards what is waiting. `copied(payload, begin, end)` is told of every payload that has left."""
        self.link, self._lane, self._changed, self._failed, self._copied = link, lane, changed, failed, copied
        self._waiting: deque[tuple[Payload, Mark] | None] = deque()
        self._thread = threading.Thread(target=self._work, name=f"liveavatar-link-{link.source}-to-{link.target}")
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Hold `changed`."""
        return len(self._waiting) < PLACES

    def put(self, payload: Payload, computed: Mark) -> None:
        with self._changed:
            self._waiting.append((payload, computed))
            self._changed.notify_all()

    def end(self) -> None:
        """Drop what has not left yet and tell the far end that nothing more will come."""
        with self._changed:
            self._waiting.clear()
            self._waiting.append(None)
            self._changed.notify_all()

    def join(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.perf_counter()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            with torch.inference_mode(), _on(self._lane, self._lane.leaving):
                while (item := self._next()) is not None:
                    self._send(*item)
                    item = None
                    with self._changed:
                        if self._waiting and self._waiting[0] is not None:
                            self._waiting.popleft()
                        self._changed.notify_all()
                dist.send(_header(None), self.link.target, self.link.headers)
        except Exception as error:  # a border: whatever it is, somebody must hear of it
            self._failed(error)

    def _next(self) -> tuple[Payload, Mark] | None:
        """What is to be sent, left in its place meanwhile."""
        with self._changed:
            while not self._waiting or (self._waiting[0] is not None and not self._waiting[0][1].passed):
                self._changed.wait(POLL if self._waiting else None)
            return self._waiting[0]

    def _send(self, payload: Payload, computed: Mark) -> None:
        begin = self._lane.mark(self._lane.leaving)
        tensors: list[Tensor] = []

        def taken(x: Tensor) -> Tensor:
            tensors.append(x.contiguous())
            return torch.empty_like(tensors[-1], device="meta")

        skeleton = each(payload, taken)
        dist.send(_header(skeleton), self.link.target, self.link.headers)
        for x in tensors:
            if self.link.tensors is not None:
                x.record_stream(self._lane.leaving)
                dist.send(x, self.link.target, self.link.tensors)
            else:
                dist.send(x.cpu(), self.link.target, self.link.headers)
        end = self._lane.mark(self._lane.leaving)
        while not end.passed:  # no more than one is on its way
            time.sleep(POLL)
        self._copied(payload, begin, end)


class Incoming:
    """The far end of a link: gives what comes to the worker here."""

    def __init__(
        self, link: Link, worker: Worker, changed: threading.Condition, failed: Callable[[Exception], None]
    ) -> None:
        self.link, self._worker, self._changed, self._failed = link, worker, changed, failed
        self._thread = threading.Thread(target=self._work, name=f"liveavatar-link-{link.target}-from-{link.source}")
        self._thread.start()

    def join(self, deadline: float) -> bool:
        """Ends by itself when the near end says so; whether it has."""
        self._thread.join(max(0.0, deadline - time.perf_counter()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        lane = self._worker.lane
        try:
            with torch.inference_mode(), _on(lane, lane.arriving):
                while (payload := self._receive(lane)) is not None:
                    now = time.perf_counter()
                    self._worker.put(Waiting(payload, self.link.source, lane.mark(lane.arriving), now))
                    payload = None
        except Exception as error:  # a border: whatever it is, somebody must hear of it
            self._failed(error)

    def _receive(self, lane: Lane) -> Payload | None:
        with self._changed:
            self._changed.wait_for(self._has_room)
        header = torch.empty(HEADER, dtype=torch.uint8)
        dist.recv(header, self.link.source, self.link.headers)
        skeleton = _opened(header)
        return None if skeleton is None else each(skeleton, lambda like: self._tensor(like, lane))

    def _has_room(self) -> bool:
        return self._worker.closed or sum(x.sender == self.link.source for x in self._worker.waiting) < PLACES

    def _tensor(self, like: Tensor, lane: Lane) -> Tensor:
        if self.link.tensors is not None:
            x = torch.empty_like(like, device=lane.device)
            dist.recv(x, self.link.source, self.link.tensors)
        else:
            x = torch.empty_like(like, device="cpu", pin_memory=lane.compute is not None)
            dist.recv(x, self.link.source, self.link.headers)
            x = upload(x, lane.device)
        if lane.compute is not None:
            x.record_stream(lane.compute)
        return x


def _on(lane: Lane, stream: "torch.cuda.Stream | None") -> AbstractContextManager:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _header(skeleton: Payload | None) -> Tensor:
    """A payload whose tensors are on the meta device, as bytes; None for the end."""
    packed = pickle.dumps(skeleton)
    assert len(packed) <= HEADER, f"a payload without its tensors takes {len(packed)} bytes, {HEADER} are meant for it"
    return torch.frombuffer(bytearray(packed.ljust(HEADER, b"\0")), dtype=torch.uint8)


def _opened(header: Tensor) -> Payload | None:
    return pickle.loads(header.numpy().tobytes())
