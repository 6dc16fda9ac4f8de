"""One process, one thread per stage, for any plan: workers, and the links between them.

Links are first in, first out, so every stage still sees its blocks in order at each step; late audio changes when a
picture arrives, never what it shows.

Threads and not processes, though they share one GIL: with CUDA graphs two stages cost the host 13 ms a block each
either way, eight cost 23 ms in threads and 6 in processes, of the 90 that eight GPUs would need for one; and payloads
need no serialisation, one model serves all stages of a card, Windows works. Eager launches suffer: 37 ms alone become
518 with eight threads, which is the price of a stream's first nine blocks (bench/threads_or_processes.py, two H200s,
bench/results/threads_or_processes_2026-11-22.md).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from liveavatar_core.errors import StageError
from liveavatar_core.pipeline.links import Lane, Mark, carry, each, lanes
from liveavatar_core.pipeline.monitor import Gauges, Monitor
from liveavatar_core.pipeline.plan import PREFILL, Plan, StageSpec
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stage_threads import start
from liveavatar_core.pipeline.worker import POLL, Waiting, Worker
from liveavatar_core.types import BlockRequest, Payload

log = logging.getLogger(__name__)

PLACES = 2  # hidden states that may wait for one stage: one arrives while another is being read
STALLED = 60.0  # seconds after which a device or a link counts as dead
PATIENCE_AT_THE_END = 2.0  # seconds that a stage in the middle of a hop may take to stop


class ThreadedPipeline:
    """Runs one stream. Use as a context manager: stages run inside the `with`."""

    def __init__(self, plan: Plan, stages: Sequence[Stage], monitor: Monitor | None = None) -> None:
        self.plan = plan
        self.monitor = monitor or Monitor()
        self._changed = threading.Condition()
        self._results: deque[tuple[int, Tensor, Mark]] = deque()
        self._failure: StageError | None = None
        self._left = False  # by the driver, with stages still in the middle of a hop
        self._workers = [
            Worker(
                stage,
                lane,
                self.monitor,
                self._changed,
                has_room=partial(self._has_room, stage.spec),
                pass_on=partial(self._pass_on, stage.spec),
                apart=plan.apart if stage.spec.index == 0 else 0,
            )
            for stage, lane in zip(stages, lanes([stage.device for stage in stages]), strict=True)
        ]
        self._driver = Lane(torch.device("cpu"))
        self._running: list[Future] = []  # one per worker

    def __enter__(self) -> "ThreadedPipeline":
        for i, worker in enumerate(self._workers):
            worker.lane.follow_caller()  # the stages were made on its streams
            self._running.append(start(i, partial(self._work, worker)))
        self.monitor.watch(self._gauges)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop at the next hop and wait for the stages, but not for long."""
        self._close()
        self.monitor.watch(Gauges)
        self._left = not self.ended(PATIENCE_AT_THE_END)
        for i, (worker, running) in enumerate(zip(self._workers, self._running, strict=True)):
            if not running.done():
                log.warning("stage %d is still in the middle of a hop; its memory stays taken until that ends", i)
            with suppress(StageError, RuntimeError):  # whatever it is, the stream is over
                worker.lane.release_to_caller()
                worker.settle()
        self._workers.clear()  # they know us: without this only the garbage collector could free a stage's memory

    def ended(self, timeout: float) -> bool:
        """Whether all stages end within `timeout` seconds; in the middle of a hop they still use the model."""
        return not wait(self._running, timeout).not_done

    def prefill(self, version: int, reference: Tensor, motion: Tensor) -> None:
        """Compute a version of the attention sink on every stage. Blocks that look at it wait for it by themselves."""
        payload = Payload(block=PREFILL, step=PREFILL, sink=version, condition=(reference, motion))
        for row in self.plan.rows:
            self._give(row[0].index, payload)

    def submit(self, request: BlockRequest) -> None:
        payload = Payload(block=request.block, step=0, sink=request.sink, request=request)
        self._give(self.plan.rows[0][0].index, payload)

    def result(self, timeout: float) -> tuple[int, Tensor] | None:
        """The next finished block, in order, as (block, latent); None if none came in time. Raises StageError."""
        deadline = time.perf_counter() + timeout
        with self._changed:
            while True:
                if self._results and self._results[0][2].passed:
                    block, latent, mark = self._results.popleft()
                    self.monitor.finished(block, mark.time)
                    if latent.is_cuda:
                        latent.record_stream(torch.cuda.current_stream(latent.device))
                    return block, latent
                for worker in self._workers:
                    worker.settle()
                    worker.check_time(STALLED)
                if self._failure is not None and not self._results:
                    raise self._failure
                left = deadline - time.perf_counter()
                if left <= 0:
                    return None
                self._changed.wait(min(left, POLL) if self._results else left)

    def _give(self, stage: int, payload: Payload) -> None:
        """From the driver's own memory to a stage."""
        worker = self._workers[stage]
        carried, _, arrived = carry(each(payload, Tensor.cpu), Mark(), self._driver, worker.lane)
        worker.put(Waiting(carried, None, arrived, time.perf_counter()))

    def _gauges(self) -> Gauges:
        cards = {lane.device for lane in (worker.lane for worker in self._workers) if lane.device.type == "cuda"}
        with self._changed:
            waiting = [len(worker.waiting) for worker in self._workers]
        return Gauges(waiting, {str(card): torch.cuda.memory_allocated(card) for card in cards})

    def _has_room(self, spec: StageSpec, payload: Payload) -> bool:
        """Whether the stage that gets `payload`'s hidden states can hold them; latents are small and always fit."""
        row = self.plan.rows[spec.row]
        if spec.column + 1 == len(row):
            return True
        waiting = self._workers[row[spec.column + 1].index].waiting
        return sum(item.sender == spec.index for item in waiting) < PLACES

    def _pass_on(self, spec: StageSpec, done: Payload, computed: Mark, expected: float) -> None:
        target = self.plan.next_stage(spec, done.step)
        if target is None:
            if done.step != PREFILL:
                with self._changed:
                    self._results.append((done.block, done.latent, computed))
                    self._changed.notify_all()
        elif target is spec:  # its own stream keeps the order
            self._workers[spec.index].put(Waiting(done, None, Mark(), time.perf_counter()))
        else:
            source, worker = self._workers[spec.index], self._workers[target.index]
            carried, begin, arrived = carry(done, computed, source.lane, worker.lane)
            worker.put(Waiting(carried, spec.index, arrived, expected))
            source.copied(done, begin, arrived)

    def _work(self, worker: Worker) -> None:
        try:
            worker.work()
        except StageError as failure:
            self._fail(failure)
        if self._left:  # nobody else lets the device finish before our memory changes hands
            with suppress(RuntimeError):
                worker.lane.drain()

    def _fail(self, failure: StageError) -> None:
        with self._changed:
            self._failure = self._failure or failure
        self._close()

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
