"""Making a memory plan fit: how much of a device may be planned, what is kept in host memory where that is too little,
and what else to choose where even that is not enough. Loads nothing, needs no GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import ceil, inf

import torch

from liveavatar_core.errors import InputError, PlanError
from liveavatar_core.geometry import Geometry, fit_size
from liveavatar_core.pipeline.plan import Offload, Plan, StageSpec, layer_ring
from liveavatar_core.runtime.memory import GIB, HOST, MemoryPlan, gib, plan_memory

# Of a card's memory, what is never free: CUDA's context, 0.5 GiB, and its libraries.
OUTSIDE = GIB
# Of what is free on a card, what gaps of the allocator may take: 1.5 GiB on an H100 that was filled to the brim.
GAPS = 0.02
AREAS = (704 * 384, 688 * 368, 384 * 256)  # pixels of the sizes on offer, largest first
LARGEST_RING = 8  # devices; more than one machine has is no advice


def room(free: Mapping[str, int], vram: float | None) -> dict[str, int]:
    """What may be planned of the bytes that are there. `vram` as in RuntimeSpec."""
    most = _most(vram)
    return {
        device: int((1 - GAPS) * min(nbytes, most)) if _is_gpu(device) else nbytes for device, nbytes in free.items()
    }


def asked(memory: MemoryPlan, vram: float | None) -> dict[str, int]:
    """Bytes that must be free on each device, so that the plan has room, or as much of it as `vram` allows."""
    most = _most(vram)
    return {
        device: min(ceil(memory.on(device) / (1 - GAPS)), most) if _is_gpu(device) else memory.on(device)
        for device in memory.devices
    }


def _most(vram: float | None) -> float:
    return inf if vram is None else max(0, int(vram * GIB) - OUTSIDE)


def fit(memory: MemoryPlan, free: Mapping[str, int]) -> MemoryPlan:
    """The same with as little as possible in host memory, so that every GPU of `free` has room; with all that can be
    there where even that is not enough.

    Rings go first: of a ring three quarters cross the bus once in a block, while weights cross it in every step. What
    stays is spread evenly, so that there is always something to compute while something comes. A GPU that several
    stages share keeps everything: they would bring the same weights for each other.
    """
    for device, nbytes in free.items():
        stages = [stage for stage in memory.plan.stages if stage.device == device]
        if memory.on(device) > nbytes and _is_gpu(device) and len(stages) == 1:
            memory = _least(memory, stages[0], nbytes)
    return memory


def _least(memory: MemoryPlan, stage: StageSpec, nbytes: int) -> MemoryPlan:
    offloads = _offloads(stage, set(memory.config.audio_layers))
    if not offloads:
        return memory
    most = _with_offload(memory, stage, offloads[-1])
    if most.on(stage.device) > nbytes:
        return most
    choices = (_with_offload(memory, stage, offload) for offload in offloads)
    return next(choice for choice in choices if choice.on(stage.device) <= nbytes)


def _offloads(stage: StageSpec, audio_layers: set[int]) -> list[Offload]:
    """The least first. Two buffers take turns, so fewer than two rings or an odd number of layers make no sense."""
    rings = list(product(stage.steps, stage.layers))
    # Layers with an audio injector are half as large again: their share is constant, so that bytes grow evenly.
    heavy = [layer for layer in stage.layers if layer in audio_layers]
    light = [layer for layer in stage.layers if layer not in audio_layers]
    offloads = [Offload((), _spread(rings, count)) for count in range(2, len(rings) + 1)]
    for count in range(2, len(stage.layers) + 1, 2):
        share = count * len(heavy) // len(stage.layers)
        layers = sorted(_spread(heavy, share) + _spread(light, count - share))
        offloads.append(Offload(tuple(layers), tuple(rings)))
    return offloads


def _spread(things: Sequence, count: int) -> tuple:
    """`count` of them, as evenly as possible."""
    total = len(things)
    return tuple(thing for i, thing in enumerate(things) if (i + 1) * count // total > i * count // total)


def _with_offload(memory: MemoryPlan, stage: StageSpec, offload: Offload) -> MemoryPlan:
    rows = tuple(
        tuple(replace(cell, offload=offload) if cell == stage else cell for cell in row) for row in memory.plan.rows
    )
    return _again(memory, plan=replace(memory.plan, rows=rows))


def _again(memory: MemoryPlan, **changes) -> MemoryPlan:
    """The answer to the same question with some changes."""
    asked = {name: getattr(memory, name) for name in MemoryPlan.__slots__ if name != "parts"}
    return plan_memory(**(asked | changes))


def _is_gpu(device: str) -> bool:
    return device != HOST and torch.device(device).type == "cuda"


def check(memory: MemoryPlan, free: Mapping[str, int]) -> None:
    """Raise PlanError where a device of `free` (bytes) is too small, with the nearest settings that fit."""
    if memory.fits(free):
        return
    device = max(free, key=lambda name: memory.on(name) - free[name])
    needed, geometry = memory.on(device), memory.geometry
    hints = [f"{words} ({gib(_largest(fitting))} GiB)" for words, fitting in alternatives(memory, free)]
    advice = f"Try: {'; '.join(hints)}" if hints else "No size or precision on offer fits; use a larger card"
    name = "host memory" if device == HOST else device
    streamed = ", with all in host memory that can be streamed" if memory.on(HOST) and device != HOST else ""
    raise PlanError(
        f"{name} needs {gib(needed)} GiB for {geometry.width}x{geometry.height} with precision {memory.precision}"
        f"{streamed}, {gib(free[device])} GiB is free (short by {gib(needed - free[device])} GiB). {advice}"
    )


def alternatives(memory: MemoryPlan, free: Mapping[str, int]) -> list[tuple[str, MemoryPlan]]:
    """The nearest settings that fit, with words for a reader: first with this plan, then with a layer ring.

    Of each, those with the fewest changes; of several sizes the largest, of several rings the shortest. A ring over
    more devices than `free` names supposes that every further one has as much room as the smallest of these.
    """
    return [*_nearest(memory, free, [None]), *_nearest(memory, free, _rings(memory, free))]


def _nearest(
    memory: MemoryPlan, free: Mapping[str, int], rings: Sequence[Plan | None]
) -> Iterator[tuple[str, MemoryPlan]]:
    """Plans that fit, one per set of things changed, all with the same smallest number of changes."""
    precisions = [None] if memory.precision == "fp8" else ["fp8", None]
    kv_caches = [None] if memory.kv_cache == "fp8" else ["fp8", None]
    sizes = [None, *_smaller(memory.geometry)]
    found: set[tuple[bool, ...]] = set()
    fewest_changes_first = sorted(product(precisions, kv_caches, sizes, rings), key=lambda choice: -choice.count(None))
    for precision, kv_cache, size, ring in fewest_changes_first:
        kind = tuple(change is not None for change in (precision, kv_cache, size))
        if any(sum(kind) > sum(other) for other in found):
            return
        if kind not in found and (any(kind) or ring):
            candidate, room = _changed(memory, free, precision, kv_cache, size, ring)
            if candidate.fits(room):
                found.add(kind)
                yield _words(precision, kv_cache, size, ring), candidate


def _smaller(geometry: Geometry) -> list[Geometry]:
    sizes = []
    with suppress(InputError):  # a shape that no picture may have gets no advice on size
        sizes = [Geometry(*fit_size(geometry.height, geometry.width, area)) for area in AREAS]
    return [size for size in sizes if size.tokens_per_frame < geometry.tokens_per_frame]


def _rings(memory: MemoryPlan, free: Mapping[str, int]) -> list[Plan]:
    """Layer rings over the devices at hand, then over more of their kind; the shortest first."""
    names = [name for name in free if name != HOST]
    kind = torch.device(names[0]).type
    names += [name for i in range(LARGEST_RING) if (name := f"{kind}:{i}") not in names]
    present = len(memory.plan.stages) if memory.plan.name == "ring" else 1
    counts = range(present + 1, min(LARGEST_RING, memory.config.layers) + 1)
    return [layer_ring(memory.plan.steps, memory.config.layers, names[:count]) for count in counts]


def _changed(
    memory: MemoryPlan,
    free: Mapping[str, int],
    precision: str | None,
    kv_cache: str | None,
    geometry: Geometry | None,
    ring: Plan | None,
) -> tuple[MemoryPlan, Mapping[str, int]]:
    """The plan with these changes, fitted into the room it may take, and that room."""
    rows = tuple(tuple(replace(stage, offload=Offload()) for stage in row) for row in memory.plan.rows)
    changed = _again(
        memory,
        geometry=geometry or memory.geometry,
        plan=ring or replace(memory.plan, rows=rows),
        precision=precision or memory.precision,
        kv_cache=kv_cache or memory.kv_cache,
        decoder=ring.stages[-1].device if ring else memory.decoder,
    )
    room = dict(free)
    if ring:
        smallest = min(nbytes for device, nbytes in free.items() if device != HOST)
        room = {device: free.get(device, smallest) for device in changed.devices}
        room |= {HOST: free[HOST]} if HOST in free else {}
    return fit(changed, room), room


def _words(precision: str | None, kv_cache: str | None, geometry: Geometry | None, ring: Plan | None) -> str:
    words = []
    if precision is not None:
        words.append(f"precision {precision}")
    if kv_cache is not None:
        words.append(f"kv_cache {kv_cache}")
    if geometry is not None:
        words.append(f"size {geometry.width}x{geometry.height}")
    if ring is not None:
        words.append(f"plan ring over {len(ring.stages)} devices")
    return " with ".join(words)


def _largest(memory: MemoryPlan) -> int:
    return max(memory.on(device) for device in memory.devices)
