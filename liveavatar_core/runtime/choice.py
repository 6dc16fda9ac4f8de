"""Which plan, and where the VAE goes: the fastest that fits, by figures of the machine that are given; and why."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from liveavatar_core.config import ModelConfig, RuntimeSpec
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.costs import Rate, rate, work
from liveavatar_core.pipeline.plan import Machine, Plan, StageSpec, Work, choose
from liveavatar_core.runtime.fitting import fit
from liveavatar_core.runtime.memory import MemoryPlan, plan_memory, streamed_bytes

ALIKE = 0.02  # plans whose rates differ by less are equally fast; then the one that answers sooner is better
NAMED = 3  # plans that the reason mentions


@dataclass(frozen=True, slots=True)
class Choice:
    memory: MemoryPlan
    rate: Rate
    why: str  # one line

    @property
    def plan(self) -> Plan:
        return self.memory.plan


def choose_plan(
    config: ModelConfig,
    geometry: Geometry,
    spec: RuntimeSpec,
    precision: str,
    steps: int,
    room: Mapping[str, int],
    machine: Machine,
) -> Choice:
    """The plan that `spec` names, or the best of all for `auto`, with balanced cuts and the VAE where it disturbs
    least.

    `room`: bytes that may be used of each device; one that is not named has room for everything. If no plan fits, the
    fastest with a part of it in host memory. Raises PlanError for plans that these devices do not allow.
    """
    todo = work(config, geometry, precision)

    def memory_of(plan: Plan) -> MemoryPlan:
        return plan_memory(
            config,
            geometry,
            plan,
            precision,
            attention=spec.attention,
            kv_cache=spec.kv_cache,
            decoder=plan.decoder,
        )

    candidates = [
        (plan, rate(plan, todo, machine))
        for name, devices, decoder in arrangements(spec, steps)
        for plan in _plans(name, steps, config.layers, devices, decoder, todo, machine, memory_of, room)
    ]
    if not candidates:
        choose(spec.plan, steps, config.layers, spec.devices)  # raises what is wrong with it
    fastest = min(found.block for _, found in candidates)
    candidates.sort(key=lambda c: (round((c[1].block / fastest - 1) / ALIKE), c[1].latency, len(c[0].stages)))
    too_large = []
    for plan, expected in candidates:
        memory = memory_of(plan)
        if memory.fits(room):
            return Choice(memory, expected, _why(spec, plan, expected, candidates, too_large, machine))
        too_large.append(plan)
    fitted = [fit(memory_of(plan), room) for plan in too_large]
    memory, expected = min(
        ((memory, _streaming_rate(memory, todo, machine)) for memory in fitted),
        key=lambda found: (not found[0].fits(room), found[1].block),
    )
    return Choice(memory, expected, _why(spec, memory.plan, expected, candidates, too_large, machine))


def arrangements(spec: RuntimeSpec, steps: int) -> Iterator[tuple[str, Sequence[str], str]]:
    """(plan's name, devices of the stages, device of the VAE) of all that `spec` leaves open."""
    devices = spec.devices
    for count in dict.fromkeys((len(devices), max(1, len(devices) - 1))):
        used = devices[:count]
        decoders = devices[count:] or tuple(dict.fromkeys(used))
        for name in _names(count) if spec.plan == "auto" else (spec.plan,):
            for decoder in decoders if spec.decoder == "auto" else (spec.decoder,):
                if not (count < len(devices) and decoder in used):
                    yield name, used, decoder


def _names(count: int) -> list[str]:
    rectangles = [f"{rows}x{count // rows}" for rows in range(2, count) if count % rows == 0]
    return ["single"] if count == 1 else ["ring", "tpp", *rectangles]


def _plans(
    name: str,
    steps: int,
    layers: int,
    devices: Sequence[str],
    decoder: str,
    todo: Work,
    machine: Machine,
    memory_of: Callable[[Plan], MemoryPlan],
    room: Mapping[str, int],
) -> Iterator[Plan]:
    """Cut by speed, within each device's room if that is possible; nothing where the devices do not allow the plan."""
    holding = replace(machine, room=_room(steps, layers, decoder, memory_of, room))
    for figures in (holding, machine):
        try:
            yield choose(name, steps, layers, devices, work=todo, machine=figures, decoder=decoder)
        except PlanError:
            continue
        return


def _room(
    steps: int, layers: int, decoder: str, memory_of: Callable[[Plan], MemoryPlan], room: Mapping[str, int]
) -> Callable[[str, int], int]:
    """(device, steps) -> layers that fit there, by what one layer and what all would take."""

    @cache
    def most(device: str, count: int) -> int:
        if device not in room:
            return layers
        one, everything = (
            memory_of(Plan("part", ((StageSpec(0, 0, 0, range(count), owned, device),),), decoder)).on(device)
            for owned in (range(1), range(layers))
        )
        each = (everything - one) / max(1, layers - 1)
        return max(0, min(layers, 1 + int((room[device] - one) / each))) if each else layers

    return most


def _streaming_rate(memory: MemoryPlan, todo: Work, machine: Machine) -> Rate:
    streamed = {stage.index: streamed_bytes(memory, stage) for stage in memory.plan.stages if stage.offload}
    return rate(memory.plan, todo, machine, streamed)


def _why(
    spec: RuntimeSpec,
    plan: Plan,
    expected: Rate,
    candidates: Sequence[tuple[Plan, Rate]],
    too_large: Sequence[Plan],
    machine: Machine,
) -> str:
    """One line for a reader."""
    where = ", ".join(dict.fromkeys(stage.device for stage in plan.stages))
    line = f"{spec.plan}: " if spec.plan == plan.name else f"{spec.plan} chose {plan.name}: "
    line += f"stages on {where}, VAE on {plan.decoder}"
    if any(stage.offload for stage in plan.stages):
        line += ", a part in host memory because no plan fits"
    best: dict[str, tuple[Plan, Rate]] = {}
    for other, found in candidates:
        if other.name != plan.name:
            best.setdefault(other.name, (other, found))
    others = [
        f"{name} {_speed(found, expected, machine)}{' but does not fit' if other in too_large else ''}"
        for name, (other, found) in list(best.items())[:NAMED]
    ]
    line += f"; {_speed(expected, expected, machine)} expected"
    return line + (f" ({', '.join(others)})" if others else "")


def _speed(found: Rate, chosen: Rate, machine: Machine) -> str:
    if machine.speeds:
        return f"{found.fps:.1f} frames a second"
    return f"{chosen.block / found.block:.2f} of its rate" if found is not chosen else "the best rate"
