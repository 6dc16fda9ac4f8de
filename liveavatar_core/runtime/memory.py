"""Memory before it is taken: bytes by device and part for a model, a size and a plan. Needs no GPU.

Weights, caches and tables are counted from the shapes the code allocates. Activations and the decoder's workspace are
estimates, from one constant each. It knows sizes, not tensors: nothing here allocates anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from liveavatar_core.config import ModelConfig
from liveavatar_core.errors import InputError, PlanError
from liveavatar_core.geometry import FRAMES_PER_BLOCK, PIXELS_PER_LATENT, WINDOW_BLOCKS, Geometry, fit_size
from liveavatar_core.pipeline.plan import Plan, StageSpec, layer_ring
from liveavatar_core.weights.build import empty_dit, planned_dit, work_dtype

GIB = 1024**3
FLOAT32 = 4  # bytes
AREAS = (704 * 384, 688 * 368, 384 * 256)  # pixels of the sizes on offer, largest first
LARGEST_RING = 8  # devices; more than one machine has is no advice

# Bytes per token and channel that one forward needs beside weights and caches. Measured on the original: 1.05-1.15 GiB
# at 3168 tokens of 5120 channels, in bf16 and fp8. Our layer without fused kernels, counted on meta tensors, holds 44
# of them at once in bf16 and 73 in float32; with them an H100 wanted about 30, gaps of the allocator included.
ACTIVATION_BYTES = 72
# Full-resolution feature maps of one block that are alive at once in the decoder's widest place, the upsampling to full
# resolution. Counted on meta tensors of diffusers' decoder: 7. Measured on an H100 at 704x384: 8.2, channels last 7.7.
DECODER_MAPS = 8

ESTIMATED = ("activations", "VAE workspace")


@dataclass(frozen=True, slots=True)
class VaeSize:
    parameters: int
    width: int  # channels of the decoder at full resolution


WAN_VAE = VaeSize(126_892_531, 96)


@dataclass(frozen=True, slots=True)
class Part:
    """`nbytes` for one purpose; `stage` is None for what belongs to no stage."""

    device: str
    stage: int | None
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What `plan_memory` was asked, and its answer."""

    config: ModelConfig
    geometry: Geometry
    plan: Plan
    precision: str
    decoder: str  # device of the VAE
    vae: VaeSize
    parts: tuple[Part, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.device for part in self.parts))

    @property
    def total(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def on(self, device: str, name: str | None = None) -> int:
        """Bytes on a device, of one part or of all."""
        return sum(part.nbytes for part in self.parts if part.device == device and name in (None, part.name))

    def fits(self, free: Mapping[str, int]) -> bool:
        """Whether every device named in `free` has room; devices not named there are not judged."""
        return all(self.on(device) <= nbytes for device, nbytes in free.items())


def plan_memory(
    config: ModelConfig, geometry: Geometry, plan: Plan, precision: str, *, decoder: str, vae: VaeSize = WAN_VAE
) -> MemoryPlan:
    """Bytes of one stream. `precision` as in RuntimeSpec; `decoder`: device of the VAE."""
    parts = []
    loaded = set()
    for stage in plan.stages:
        if (stage.device, stage.layers) not in loaded:  # stages with the same layers share them
            loaded.add((stage.device, stage.layers))
            nbytes = weight_bytes(config, stage.layers, precision, stage.device)
            parts.append(Part(stage.device, stage.index, "weights", nbytes))
        itemsize = work_dtype(precision, stage.device).itemsize
        held = _stage_bytes(config, geometry, stage, itemsize)
        parts += [Part(stage.device, stage.index, name, nbytes) for name, nbytes in held.items()]
    parts += [Part(decoder, None, name, nbytes) for name, nbytes in _vae_bytes(geometry, decoder, vae).items()]
    return MemoryPlan(
        config=config,
        geometry=geometry,
        plan=plan,
        precision=precision,
        decoder=decoder,
        vae=vae,
        parts=tuple(parts),
    )


def weight_bytes(config: ModelConfig, layers: range, precision: str, device: str) -> int:
    """Of the model's part for `layers`, as `load_dit` will make it."""
    return _weight_bytes(config, layers, work_dtype(precision, device), precision == "fp8")


@cache
def _weight_bytes(config: ModelConfig, layers: range, dtype: torch.dtype, fp8: bool) -> int:
    # Laying out fp8 takes seconds at full size: once for the whole model, whichever cuts are looked at.
    modules = {name.rpartition(".")[0] for name in empty_dit(config, layers).state_dict()}
    nbytes = _module_bytes(config, dtype, fp8)
    return sum(nbytes[module] for module in modules)


@cache
def _module_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> dict[str, int]:
    nbytes: dict[str, int] = {}
    for name, tensor in planned_dit(config, dtype=dtype, fp8=fp8).state_dict().items():
        module = name.rpartition(".")[0]
        nbytes[module] = nbytes.get(module, 0) + tensor.nbytes
    return nbytes


def _stage_bytes(config: ModelConfig, geometry: Geometry, stage: StageSpec, itemsize: int) -> dict[str, int]:
    steps, layers = len(stage.steps), len(stage.layers)
    row = config.dim * itemsize  # one token's keys, or its values
    visible = geometry.sink_tokens + WINDOW_BLOCKS * geometry.tokens_per_block
    time_tables = (steps + 1) * (6 + 1) * config.dim * FLOAT32  # every step's and the prefill's
    rotary = geometry.motion_tokens * config.head_dim * FLOAT32
    return {
        "block caches": steps * layers * 2 * visible * row,
        # A version as its prefill leaves it, beside the reference keys of the one that the caches still show.
        "attention sink": layers * (2 * geometry.sink_tokens + geometry.tokens_per_frame) * row,
        "text and tables": layers * 2 * config.text_len * row + time_tables + rotary,
        "activations": ACTIVATION_BYTES * geometry.tokens_per_block * config.dim,
    }


def _vae_bytes(geometry: Geometry, device: str, vae: VaeSize) -> dict[str, int]:
    itemsize = FLOAT32 if torch.device(device).type == "cpu" else 2
    # Channels that the 32 causal convolutions remember, by resolution (SPEC 6.2): latent, and x2, x4, x8 of it.
    latent = 16 + 11 * 4 * vae.width
    doubled = 2 * vae.width + 6 * 4 * vae.width
    channels = latent + 4 * doubled + 16 * 6 * 2 * vae.width + 64 * 7 * vae.width
    pixels = geometry.height * geometry.width
    return {
        "VAE weights": vae.parameters * itemsize,
        "VAE caches": 2 * channels * pixels // PIXELS_PER_LATENT**2 * itemsize,  # two frames each
        "VAE workspace": DECODER_MAPS * FRAMES_PER_BLOCK * vae.width * pixels * itemsize,
    }


def table(memory: MemoryPlan, free: Mapping[str, int] | None = None) -> str:
    """The plan as lines of text, a column per device, in GiB; with `free` also what each device has."""
    geometry, plan = memory.geometry, memory.plan
    rows = [("GiB", list(memory.devices))]
    for name in dict.fromkeys(part.name for part in memory.parts):
        label = f"{name} (estimate)" if name in ESTIMATED else name
        held = [memory.on(device, name) for device in memory.devices]
        rows.append((label, [_gib(nbytes) if nbytes else "-" for nbytes in held]))
    rows.append(("needed", [_gib(memory.on(device)) for device in memory.devices]))
    if free:
        rows.append(("free", [_gib(free[device]) if device in free else "?" for device in memory.devices]))
    first = max(len(label) for label, _ in rows)
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    lines = [label.ljust(first) + "".join(cell.rjust(width) for cell in cells) for label, cells in rows]
    title = f"{geometry.width}x{geometry.height}, {plan.steps} steps, precision {memory.precision}, plan {plan.name}"
    return "\n".join([f"{title}, {_gib(memory.total)} GiB in all", *lines])


def check(memory: MemoryPlan, free: Mapping[str, int]) -> None:
    """Raise PlanError where a device of `free` (bytes) is too small, with the nearest settings that fit."""
    if memory.fits(free):
        return
    device = max(free, key=lambda name: memory.on(name) - free[name])
    needed, geometry = memory.on(device), memory.geometry
    hints = [f"{words} ({_gib(_largest(fitting))} GiB)" for words, fitting in alternatives(memory, free)]
    advice = f"Try: {'; '.join(hints)}" if hints else "No size or precision on offer fits; use a larger card"
    raise PlanError(
        f"{device} needs {_gib(needed)} GiB for {geometry.width}x{geometry.height} with precision {memory.precision}, "
        f"{_gib(free[device])} GiB is free (short by {_gib(needed - free[device])} GiB). {advice}"
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
    sizes = [None, *_smaller(memory.geometry)]
    found: set[tuple[bool, bool]] = set()
    fewest_changes_first = sorted(product(precisions, sizes, rings), key=lambda choice: -choice.count(None))
    for precision, size, ring in fewest_changes_first:
        kind = (precision is not None, size is not None)
        if any(sum(kind) > sum(other) for other in found):
            return
        if kind not in found and (any(kind) or ring):
            candidate, room = _changed(memory, free, precision, size, ring)
            if candidate.fits(room):
                found.add(kind)
                yield _words(precision, size, ring), candidate


def _smaller(geometry: Geometry) -> list[Geometry]:
    sizes = []
    with suppress(InputError):  # a shape that no picture may have gets no advice on size
        sizes = [Geometry(*fit_size(geometry.height, geometry.width, area)) for area in AREAS]
    return [size for size in sizes if size.tokens_per_frame < geometry.tokens_per_frame]


def _rings(memory: MemoryPlan, free: Mapping[str, int]) -> list[Plan]:
    """Layer rings over the devices at hand, then over more of their kind; the shortest first."""
    names = list(free)
    kind = torch.device(names[0]).type
    names += [name for i in range(LARGEST_RING) if (name := f"{kind}:{i}") not in names]
    present = len(memory.plan.stages) if memory.plan.name == "ring" else 1
    counts = range(present + 1, min(LARGEST_RING, memory.config.layers) + 1)
    return [layer_ring(memory.plan.steps, memory.config.layers, names[:count]) for count in counts]


def _changed(
    memory: MemoryPlan, free: Mapping[str, int], precision: str | None, geometry: Geometry | None, ring: Plan | None
) -> tuple[MemoryPlan, Mapping[str, int]]:
    """The plan with these changes, and the room it may take."""
    plan = ring or memory.plan
    decoder = plan.stages[-1].device if ring else memory.decoder
    changed = plan_memory(
        memory.config,
        geometry or memory.geometry,
        plan,
        precision or memory.precision,
        decoder=decoder,
        vae=memory.vae,
    )
    room = {device: free.get(device, min(free.values())) for device in changed.devices} if ring else free
    return changed, room


def _words(precision: str | None, geometry: Geometry | None, ring: Plan | None) -> str:
    words = []
    if precision is not None:
        words.append(f"precision {precision}")
    if geometry is not None:
        words.append(f"size {geometry.width}x{geometry.height}")
    if ring is not None:
        words.append(f"plan ring over {len(ring.stages)} devices")
    return " with ".join(words)


def _largest(memory: MemoryPlan) -> int:
    return max(memory.on(device) for device in memory.devices)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
