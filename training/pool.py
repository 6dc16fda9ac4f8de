"""Things that are costly to make and cheap to learn from again: the newest of them, renewed bit by bit."""

import atexit
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


class Pool(Generic[Item]):
    def __init__(
        self, size: int, make: Callable[[int], Item], *, first_seed: int, begin_with: int, beside: bool = False
    ) -> None:
        """`make(seed)` gives one thing. `begin_with` are made at once; the pool grows to `size`.

        `beside`: later ones are made by a thread, on a stream of its own of the caller's GPU, beside whatever learns.
        """
        self._make, self._first_seed, self.made = make, first_seed, 0
        self._items: deque[Item] = deque(maxlen=size)
        self._wanted: threading.Semaphore | None = None
        self.refresh(min(size, begin_with))
        if beside:
            self._wanted, self._over = threading.Semaphore(0), False
            thread = threading.Thread(target=self._work, args=(torch.cuda.current_device(),), name="pool", daemon=True)
            thread.start()
            atexit.register(self._end, thread)

    def refresh(self, count: int) -> None:
        """Make `count` things of seeds not used before, now or when the thread gets to it; of a full pool the oldest
        go."""
        for _ in range(count):
            if self._wanted is not None:
                self._wanted.release()
            else:
                self._items.append(self._next())

    def draw(self, count: int, generator: random.Random) -> list[Item]:
        chosen = generator.choices(tuple(self._items), k=count)
        for tensor in (tensor for item in chosen for tensor in _tensors(item) if tensor.is_cuda):
            tensor.record_stream(torch.cuda.current_stream())  # its memory was the thread's; it may be dropped soon
        return chosen

    def _next(self) -> Item:
        item = self._make(self._first_seed + self.made)
        self.made += 1
        return item

    def _end(self, thread: threading.Thread) -> None:
        """A thread that is on the GPU when the interpreter goes takes the process down."""
        self._over = True
        self._wanted.release()
        thread.join()

    def _work(self, device: int) -> None:
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream()
        while self._wanted.acquire() and not self._over:
            with torch.cuda.stream(stream):
                made = self._next()
            stream.synchronize()  # whoever draws it works on another stream
            self._items.append(made)


def _tensors(item: object) -> list[Tensor]:
    parts = [getattr(item, field.name) for field in fields(item)] if is_dataclass(item) else [item]
    return [part for part in parts if isinstance(part, Tensor)]
