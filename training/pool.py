"""Things that are costly to make and cheap to learn from again: the newest of them, renewed bit by bit."""

import random
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Pool(Generic[Item]):
    def __init__(self, size: int, make: Callable[[int], Item], *, first_seed: int, begin_with: int) -> None:
        """`make(seed)` gives one thing. `begin_with` are made at once; the pool grows to `size`."""
        self._make, self._seed = make, first_seed
        self._items: deque[Item] = deque(maxlen=size)
        self.refresh(min(size, begin_with))

    def refresh(self, count: int) -> None:
        """Make `count` things of seeds not used before; where the pool is full the oldest go."""
        for _ in range(count):
            self._items.append(self._make(self._seed))
            self._seed += 1

    def draw(self, count: int, generator: random.Random) -> list[Item]:
        return generator.choices(self._items, k=count)
