"""Things that are costly to make and cheap to learn from again: the newest of them, renewed bit by bit."""

import atexit
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from training.turns import beside

Item = TypeVar("Item")
THREADS = 2


class Pool(Generic[Item]):
    def __init__(
        self, size: int, make: Callable[[int], Item], *, first_seed: int, begin_with: int, beside: bool = False
    ) -> None:
        """`make(seed)` gives one thing. `begin_with` are made at once; the pool grows to `size`.

        `beside`: threads make the later ones beside whatever learns; on a GPU each has a stream of its own, which goes
        first, since it launches thousands of small kernels one by one.
        """
        self._make, self._first_seed, self.made, self._counting = make, first_seed, 0, threading.Lock()
        self._items: deque[Item] = deque(maxlen=size)
        self._wanted: threading.Semaphore | None = None
        self.refresh(min(size, begin_with))
        if beside:
            self._wanted, self._over = threading.Semaphore(0), False
            streams = [torch.cuda.Stream(priority=-1) if torch.cuda.is_available() else None for _ in range(THREADS)]
            workers = [threading.Thread(target=self._work, args=(stream,), daemon=True) for stream in streams]
            for worker in workers:
                worker.start()
            atexit.register(self._end, workers)

    def refresh(self, count: int) -> None:
        """Make `count` things of seeds not used before, now or when a thread gets to it; of a full pool the oldest
        go."""
        for _ in range(count):
            if self._wanted is not None:
                self._wanted.release()
            else:
                self._items.append(self._next())

    def draw(self, count: int, generator: random.Random) -> list[Item]:
        chosen = generator.choices(tuple(self._items), k=count)
        for tensor in (tensor for item in chosen for tensor in _tensors(item) if tensor.is_cuda):
            tensor.record_stream(torch.cuda.current_stream())  # its memory was a thread's; it may be dropped soon
        return chosen

    def _next(self) -> Item:
        with self._counting:
            seed = self._first_seed + self.made
            self.made += 1
        return self._make(seed)

    def _end(self, workers: Sequence[threading.Thread]) -> None:
        """A thread that is on the GPU when the interpreter goes takes the process down."""
        self._over = True
        self._wanted.release(len(workers))
        for worker in workers:
            worker.join()

    def _work(self, stream: torch.cuda.Stream | None) -> None:
        while self._wanted.acquire() and not self._over:
            with beside(), torch.cuda.stream(stream):  # and its device
                made = self._next()
                if stream is not None:
                    stream.synchronize()  # whoever draws it works on another stream
            self._items.append(made)


def _tensors(item: object) -> list[Tensor]:
    parts = [getattr(item, field.name) for field in fields(item)] if is_dataclass(item) else [item]
    return [part for part in parts if isinstance(part, Tensor)]
