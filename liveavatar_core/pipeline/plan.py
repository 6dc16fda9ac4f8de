"""Plans: the grid (step, layer) cut into rectangles, one per stage. Pure data, no torch.

A block needs, at (step, layer), only its own hidden states and what earlier blocks left at the same step and layer.
So any cut of the grid is exact (SPEC 10), and the schedules people know are three ways to cut:

    single      one stage owns everything
    TPP         one row of steps per stage
    layer ring  one range of layers per stage; blocks circle once per step

Rows share steps, columns share layers; rows x columns gives the mixtures.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import inf

from liveavatar_core.errors import PlanError

PREFILL = -1  # stands where a step would, for a payload that fills the attention sink


@dataclass(frozen=True, slots=True)
class Offload:
    """What of a stage lives in host memory and visits the device when its turn comes."""

    weights: tuple[int, ...] = ()  # layers
    rings: tuple[tuple[int, int], ...] = ()  # (step, layer)

    def __bool__(self) -> bool:
        return bool(self.weights or self.rings)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One rectangle steps x layers on one device."""

    index: int
    row: int
    column: int
    steps: range
    layers: range
    device: str
    offload: Offload = Offload()


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    rows: tuple[tuple[StageSpec, ...], ...]
    decoder: str  # device of the VAE

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        return tuple(stage for row in self.rows for stage in row)

    @property
    def steps(self) -> int:
        return self.rows[-1][0].steps.stop

    @property
    def depth(self) -> int:
        """Blocks in flight that keep every stage busy: as many again as there are stages, since in a ring blocks end
        in bunches of that size, and the next ones are asked for while the frames of these are decoded."""
        return len(self.stages) + max(2, len(self.stages))

    @property
    def apart(self) -> int:
        """How many of the first blocks enter a ring one lap after another. They then end one after another too, and
        not in a bunch that the decoder cannot keep up with; and while launching takes longer than computing, block 0
        does not wait for younger ones.
        """
        first, *others = self.rows[0]
        return len(self.rows[0]) if others and len(first.steps) > 1 else 0

    def row_of(self, step: int) -> int:
        return next(i for i, row in enumerate(self.rows) if step in row[0].steps)

    def next_stage(self, stage: StageSpec, step: int) -> StageSpec | None:
        """Where a payload goes when it leaves `stage` with `step` ahead of it; None when it has arrived."""
        row = self.rows[stage.row]
        if stage.column + 1 < len(row):
            return row[stage.column + 1]
        if step in (PREFILL, self.steps):
            return None
        return self.rows[self.row_of(step)][0]

    def route(self) -> list[tuple[int, int]]:
        """One block's hops: (stage index, step) in order."""
        return [(stage.index, step) for step in range(self.steps) for stage in self.rows[self.row_of(step)]]


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done, in seconds of a device whose speed is 1. `costs.work` knows the model's."""

    layers: tuple[float, ...]  # one step of each layer, with the audio injection that follows it
    embed: float = 0.0  # beside the first layer, in every step
    head: float = 0.0  # beside the last
    decode: float = 0.0  # the VAE, once per block
    hidden: int = 0  # bytes of the hidden states that pass from layer to layer


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices that the work is shared out to. Of what is not named here nothing is known."""

    speeds: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[tuple[str, str], float] = field(default_factory=dict)  # bytes a second, from and to
    bus: float = inf  # bytes a second from host memory to a device
    room: Callable[[str, int], int] | None = None  # (device, steps) -> how many layers it can hold

    def speed(self, device: str) -> float:
        return self.speeds.get(device, 1.0)

    def copy_seconds(self, source: str, target: str, nbytes: int) -> float:
        return 0.0 if source == target else nbytes / self.links.get((source, target), inf)


def grid(
    name: str,
    steps: int,
    layers: int,
    devices: Sequence[Sequence[str]],
    *,
    work: Work | None = None,
    machine: Machine | None = None,
    decoder: str | None = None,
) -> Plan:
    """One row of stages per entry of `devices`, one column per device in it, cut so that the slowest is as fast as it
    can be. Without `work` and `machine` all layers and devices count the same. `decoder`: device of the VAE; None: the
    last stage's.
    """
    work, machine = work or Work((1.0,) * layers), machine or Machine()
    decoder = decoder or devices[-1][-1]
    shares = Counter(name for row in devices for name in row)  # stages that have a device in common
    parts = [[_Part(name, machine, work, decoder, shares[name]) for name in row] for row in devices]
    rows, index = [], 0
    for cells, row_steps in zip(parts, _share_steps(steps, parts, work), strict=True):
        row = []
        for column, (cell, owned) in enumerate(zip(cells, _share_layers(len(row_steps), cells, work)[1], strict=True)):
            row.append(StageSpec(index, len(rows), column, row_steps, owned, cell.device))
            index += 1
        rows.append(tuple(row))
    return Plan(name, tuple(rows), decoder)


class _Part:
    """What one stage would take for its share of the work."""

    def __init__(self, device: str, machine: Machine, work: Work, decoder: str, stages: int) -> None:
        self.device = device
        self._speed = machine.speed(device) / stages
        self._beside = work.decode / stages if device == decoder else 0.0
        self._room = machine.room

    def seconds(self, cost: float, steps: int) -> float:
        """Of a block, for layers that cost `cost` a step."""
        return (steps * cost + self._beside) / self._speed

    def most(self, steps: int) -> float:
        return inf if self._room is None else self._room(self.device, steps)


def _share_steps(steps: int, rows: Sequence[Sequence[_Part]], work: Work) -> list[range]:
    if len(rows) > steps:
        raise PlanError(f"{steps} steps cannot be shared by {len(rows)} devices; use at most {steps}")

    @cache
    def seconds(row: int, count: int) -> float:
        return _share_layers(count, rows[row], work)[0]

    return _cut(steps, len(rows), lambda row, first, last: seconds(row, last - first))[1]


def _share_layers(steps: int, cells: Sequence[_Part], work: Work) -> tuple[float, list[range]]:
    """Seconds of the slowest, and everybody's layers."""
    total = len(work.layers)
    if len(cells) > total:
        raise PlanError(f"{total} layers cannot be shared by {len(cells)} devices; use at most {total}")
    before = [0.0]
    for cost in work.layers:
        before.append(before[-1] + cost)

    def seconds(cell: int, first: int, last: int) -> float:
        cost = before[last] - before[first] + work.embed * (first == 0) + work.head * (last == total)
        return cells[cell].seconds(cost, steps) if last - first <= cells[cell].most(steps) else inf

    return _cut(total, len(cells), seconds)


def _cut(total: int, parts: int, seconds: Callable[[int, int, int], float]) -> tuple[float, list[range]]:
    """`total` things in `parts` contiguous ranges, none empty; `seconds(part, first, last)` says how long each takes.

    The slowest is as fast as can be; then all are as even as possible; then the longer ones come last.
    """
    limit = _best(total, parts, seconds, max)[0]
    if limit == inf:
        raise PlanError("the devices cannot hold the model between them; use more of them, or a smaller precision")
    slack = limit * (1 + 1e-9)

    def squared(part: int, first: int, last: int) -> float:
        taken = seconds(part, first, last)
        return taken * taken if taken <= slack else inf

    return limit, _best(total, parts, squared, lambda a, b: a + b)[1]


def _best(
    total: int,
    parts: int,
    value: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[range]]:
    """The contiguous ranges whose joined values are least; of equals those that begin with the shorter ranges."""
    best: dict[int, tuple[float, list[range]]] = {total: (0.0, [])}
    for part in reversed(range(parts)):
        rest, best = best, {}
        firsts = [0] if part == 0 else range(part, total - (parts - part) + 1)
        for first in firsts:
            for last in range(first + 1, total + 1):
                if last in rest:
                    joined = join(value(part, first, last), rest[last][0])
                    if first not in best or joined < best[first][0] * (1 - 1e-9):
                        best[first] = joined, [range(first, last), *rest[last][1]]
    return best[0]


def single(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    return choose("single", steps, layers, devices)


def tpp(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    """Timestep-forcing pipeline parallelism; more steps than devices fold onto them."""
    return choose("tpp", steps, layers, devices)


def layer_ring(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    return choose("ring", steps, layers, devices)


def arrange(name: str, devices: Sequence[str]) -> list[Sequence[str]]:
    """Devices of each row for the plan called `name`; `auto`: everything on one, else a ring, which needs least."""
    if name == "single" or (name == "auto" and len(devices) == 1):
        return [devices[:1]]
    if name in ("ring", "auto"):
        return [devices]
    if name == "tpp":
        return [[device] for device in devices]
    rectangle = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if rectangle is None:
        raise PlanError(f"plan is {name!r}; it must be auto, single, tpp, ring, or rows x columns like 2x2")
    rows, columns = map(int, rectangle.groups())
    if rows * columns != len(devices):
        raise PlanError(f"plan {name} is for {rows * columns} devices, {len(devices)} are named; change one of the two")
    return [devices[row * columns : (row + 1) * columns] for row in range(rows)]


def choose(
    name: str,
    steps: int,
    layers: int,
    devices: Sequence[str],
    *,
    work: Work | None = None,
    machine: Machine | None = None,
    decoder: str | None = None,
) -> Plan:
    """The plan called `name` over `devices`, in their order. Further arguments as for `grid`."""
    rows = arrange(name, devices)
    if name == "auto":
        name = "single" if len(devices) == 1 else "ring"
    return grid(name, steps, layers, rows, work=work, machine=machine, decoder=decoder)
