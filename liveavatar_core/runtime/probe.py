"""How fast this machine's devices and links are: measured once per process, in some tenths of a second."""

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from liveavatar_core.pipeline.plan import Machine

SIZE = 4096  # of the square products
BYTES = 32 * 2**20  # of a copy, about one block's hidden states
REPEATS = 10


def measure(devices: Sequence[str]) -> Machine:
    """Speeds in TFLOP per second of bf16 products, links and bus in bytes per second. CPUs are not measured: with
    nothing but them, nothing is known and all count the same."""
    cards = tuple(dict.fromkeys(name for name in devices if torch.device(name).type == "cuda"))
    return _measure(cards) if cards else Machine()


@cache
def _measure(cards: tuple[str, ...]) -> Machine:
    speeds = {card: _speed(torch.device(card)) for card in cards}
    links = {(a, b): _copy(torch.device(a), torch.device(b)) for a in cards for b in cards if a != b}
    host = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True)
    bus = BYTES / _seconds(torch.device(cards[0]), lambda: host.to(cards[0], non_blocking=True))
    return Machine(speeds, links, bus)


def _speed(device: torch.device) -> float:
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIZE**3 / _seconds(device, lambda: a @ b) / 1e12


def _copy(source: torch.device, target: torch.device) -> float:
    x, y = (torch.empty(BYTES, dtype=torch.uint8, device=device) for device in (source, target))
    return BYTES / _seconds(source, lambda: y.copy_(x, non_blocking=True))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one call, on a device that is warm."""
    for _ in range(3):
        work()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / REPEATS
