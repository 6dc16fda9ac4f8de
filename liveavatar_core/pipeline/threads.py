"""One process, one thread per stage: inboxes instead of links. The host side of a pipeline, for any plan.

A worker takes the oldest block that is ready. Links are first in, first out, so every stage still sees its blocks
in order at each step; late audio changes when a picture arrives, never what it shows.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from liveavatar_core.errors import StageError
from liveavatar_core.pipeline.plan import PREFILL, Plan
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.types import BlockRequest, Payload


class _Inbox:
    """Payloads waiting for one stage."""

    def __init__(self) -> None:
        self._waiting: list[Payload] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, payload: Payload) -> None:
        with self._changed:
            self._waiting.append(payload)
            self._changed.notify()

    def take(self, ready: Callable[[Payload], bool]) -> Payload | None:
        """The oldest ready payload; waits for one. None once closed."""
        with self._changed:
            while not self._closed:
                candidates = [payload for payload in self._waiting if ready(payload)]
                if candidates:
                    oldest = min(candidates, key=lambda payload: payload.block)
                    self._waiting.remove(oldest)
                    return oldest
                self._changed.wait()
        return None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()


class ThreadedPipeline:
    """Runs one stream. Use as a context manager: threads live inside the `with`."""

    def __init__(self, plan: Plan, stages: Sequence[Stage]) -> None:
        self.plan = plan
        self._stages = stages
        self._inboxes = [_Inbox() for _ in stages]
        self._results: queue.Queue[tuple[int, Tensor] | StageError] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._work, args=(stage,), name=f"liveavatar-stage-{stage.spec.index}")
            for stage in stages
        ]

    def __enter__(self) -> "ThreadedPipeline":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop at the next hop and wait for the threads."""
        self._close()
        for thread in self._threads:
            thread.join()

    def prefill(self, version: int, reference: Tensor, motion: Tensor) -> None:
        """Compute a version of the attention sink on every stage. Blocks that look at it wait for it by themselves."""
        payload = Payload(block=PREFILL, step=PREFILL, sink=version, condition=(reference, motion))
        for row in self.plan.rows:
            self._inboxes[row[0].index].put(payload)

    def submit(self, request: BlockRequest) -> None:
        payload = Payload(block=request.block, step=0, sink=request.sink, request=request)
        self._inboxes[self.plan.rows[0][0].index].put(payload)

    def result(self, timeout: float) -> tuple[int, Tensor] | None:
        """The next finished block, in order, as (block, latent); None if none came in time. Raises StageError."""
        try:
            result = self._results.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(result, StageError):
            raise result
        return result

    def _close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()

    def _work(self, stage: Stage) -> None:
        on_cuda = stage.device.type == "cuda"
        inbox = self._inboxes[stage.spec.index]
        with torch.inference_mode(), torch.cuda.device(stage.device) if on_cuda else nullcontext():
            while (payload := inbox.take(stage.ready)) is not None:
                try:
                    done = stage.run(payload)
                except Exception as error:  # a border: whatever it is, the driver must hear of it
                    failure = StageError(stage.spec.index, payload.block, payload.step, str(error) or repr(error))
                    failure.__cause__ = error
                    self._results.put(failure)
                    self._close()
                    return
                target = self.plan.next_stage(stage.spec, done.step)
                if target is not None:
                    self._inboxes[target.index].put(done)
                elif done.step != PREFILL:
                    self._results.put((done.block, done.latent))
