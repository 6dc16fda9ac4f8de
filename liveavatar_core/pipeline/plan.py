"""Plans: the grid (step, layer) cut into rectangles, one per stage. Pure data, no torch.

A block needs, at (step, layer), only its own hidden states and what earlier blocks left at the same step and layer.
So any cut of the grid is exact (SPEC 10), and the schedules people know are three ways to cut:

    single      one stage owns everything
    TPP         one row of steps per stage
    layer ring  one range of layers per stage; blocks circle once per step

Rows share steps, columns share layers; rows x columns gives the mixtures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        return tuple(stage for row in self.rows for stage in row)

    @property
    def steps(self) -> int:
        return self.rows[-1][0].steps.stop

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


def split(total: int, parts: int, what: str) -> list[range]:
    """`total` things in `parts` contiguous ranges, as even as possible, the longer ones last."""
    if not 1 <= parts <= total:
        raise PlanError(f"{total} {what} cannot be shared by {parts} devices; use at most {total}")
    bounds = [total * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def grid(name: str, steps: int, layers: int, devices: Sequence[Sequence[str]]) -> Plan:
    """One row of stages per entry of `devices`, one column per device in it."""
    rows = []
    index = 0
    for row, (row_steps, names) in enumerate(zip(split(steps, len(devices), "steps"), devices, strict=True)):
        cells = []
        for column, (row_layers, device) in enumerate(zip(split(layers, len(names), "layers"), names, strict=True)):
            cells.append(StageSpec(index, row, column, row_steps, row_layers, device))
            index += 1
        rows.append(tuple(cells))
    return Plan(name, tuple(rows))


def single(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    return grid("single", steps, layers, [devices[:1]])


def tpp(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    """Timestep-forcing pipeline parallelism; more steps than devices fold onto them."""
    return grid("tpp", steps, layers, [[device] for device in devices])


def layer_ring(steps: int, layers: int, devices: Sequence[str]) -> Plan:
    return grid("ring", steps, layers, [devices])


PLANS = {"single": single, "tpp": tpp, "ring": layer_ring}


def choose(name: str, steps: int, layers: int, devices: Sequence[str]) -> Plan:
    """The plan called `name`. `auto`: everything on one device, else a layer ring, which needs the least memory."""
    if name == "auto":
        name = "single" if len(devices) == 1 else "ring"
    if name not in PLANS:
        raise PlanError(f"plan is {name!r}; it must be auto or one of {', '.join(sorted(PLANS))}")
    return PLANS[name](steps, layers, devices)
