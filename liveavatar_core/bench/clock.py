"""Time on devices: marks on the GPU's own time line, repeated calls on a hot card, and what a profiler saw."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

KINDS = (  # kind, parts of kernel names; the first match counts
    ("host copies", ("htod", "dtoh")),
    ("attention", ("sdpa", "flash", "fmha", "attention", "attend")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "wgmma")),
    ("convolutions", ("conv", "implicit")),
    ("copies", ("memcpy", "memset", "copy_kernel", "catarray", "nchwtonhwc", "nhwctonchw")),
    ("fused pointwise", ("_norm", "_gated", "_heads", "_quantise", "_gather", "_put")),
)
OTHER = "other pointwise"
LISTED = 8  # of the slowest kernels


def cuda_devices(names: Iterable[str]) -> list[torch.device]:
    return list(dict.fromkeys(device for name in names if (device := torch.device(name)).type == "cuda"))


def synchronise(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


class Marks:
    """Moments and the milliseconds between them. On one GPU its own time line, and marking waits for nothing; else
    the host's clock, after waiting for all devices."""

    def __init__(self, devices: Iterable[str]) -> None:
        names = set(devices)
        self._devices = cuda_devices(names)
        self._on_gpu = len(self._devices) == len(names) == 1
        self._marks: list = []

    def mark(self) -> None:
        if self._on_gpu:
            with torch.cuda.device(self._devices[0]):
                event = torch.cuda.Event(enable_timing=True)
                event.record()
            self._marks.append(event)
        else:
            synchronise(self._devices)
            self._marks.append(time.perf_counter())

    def periods(self) -> list[float]:
        synchronise(self._devices)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) if self._on_gpu else 1000 * (b - a) for a, b in pairs]


def call_ms(device: str, work: Callable[[], object], seconds: float) -> float:
    """Milliseconds of one call, from calls one after the other for about `seconds`, after half as many to warm up."""
    count, taken = 1, 0.0
    while True:
        marks = Marks([device])
        marks.mark()
        for _ in range(count):
            work()
        marks.mark()
        (taken,) = marks.periods()
        if 1000 * seconds <= 2 * taken or count > 10_000:
            break
        count *= 2
    marks = Marks([device])
    marks.mark()
    for _ in range(2 * count):
        work()
    marks.mark()
    return marks.periods()[0] / (2 * count)


@dataclass
class Profile:
    """Kernel milliseconds by kind, and the slowest kernels as (name, calls, ms); empty where none was seen."""

    kinds: dict[str, float] = field(default_factory=dict)
    slowest: list[tuple[str, int, float]] = field(default_factory=list)

    @property
    def kernels_ms(self) -> float | None:
        """Of all that is not a copy between host and device, which may run beside the rest."""
        return sum(ms for kind, ms in self.kinds.items() if kind != "host copies") if self.kinds else None


def profile(work: Callable[[], object], devices: Iterable[str], parts: int = 1) -> Profile:
    """What GPUs do during `work`, per each of its `parts` equal parts; nothing without a GPU."""
    cuda = cuda_devices(devices)
    if not cuda:
        work()
        return Profile()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        work()
        synchronise(cuda)
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms = event.time_range.elapsed_us() / 1000 / parts
            kinds[kind_of(event.name)] += ms
            names[event.name].append(ms)
    slowest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LISTED]
    return Profile(
        {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        [(name[:90], round(len(ms) / parts), round(sum(ms), 2)) for name, ms in slowest],
    )


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), OTHER)
