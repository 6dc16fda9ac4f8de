"""Clips that are costly to make and cheap to learn from again: the newest of them, renewed bit by bit."""

import random
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Clip = dict[str, Tensor]


class Pool:
    """The newest `size` clips, all on the device where `make(seed)` puts them."""

    def __init__(self, size: int, make: Callable[[int], Clip], *, first_seed: int, begin_with: int) -> None:
        self._make, self._seed = make, first_seed
        self._clips: deque[Clip] = deque(maxlen=size)
        self.refresh(min(size, begin_with))

    def refresh(self, count: int) -> None:
        """Make `count` clips of seeds not used before; where the pool is full the oldest go."""
        for _ in range(count):
            self._clips.append(self._make(self._seed))
            self._seed += 1

    def draw(self, count: int, generator: random.Random) -> Clip:
        """`count` clips at random, stacked name by name."""
        chosen = generator.choices(self._clips, k=count)
        return {name: torch.stack([clip[name] for clip in chosen]) for name in chosen[0]}
