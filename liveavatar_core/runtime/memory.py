"""Memory before it is taken: bytes by device and part for a model, a size and a plan, and as a table. Needs no GPU.

Weights, caches and tables are counted from the shapes the code allocates. Activations and the decoder's workspace are
estimates, from one constant each. It knows sizes, not tensors: nothing here allocates anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from liveavatar_core.config import ModelConfig
from liveavatar_core.geometry import FRAMES_PER_BLOCK, PIXELS_PER_LATENT, WINDOW_BLOCKS, Geometry
from liveavatar_core.model.cache import kinds, token_bytes
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.model.hosted import image_bytes, layer_tensors
from liveavatar_core.model.pointwise import FP8
from liveavatar_core.pipeline.hosted import VERSIONS
from liveavatar_core.pipeline.plan import Plan, StageSpec
from liveavatar_core.weights.build import empty_dit, planned_dit, work_dtype

GIB = 1024**3
HOST = "host"  # stands where a device would
FLOAT32 = 4  # bytes
BUS = 25e9  # bytes a second from host memory, for an estimate: PCIe 4 with 16 lanes

# Bytes per token and channel that one forward needs beside weights and caches. An H100 wanted 19 at 3168 tokens of 5120
# channels, gaps of the allocator apart; without fused kernels a layer holds 44 at once in bf16, by count.
ACTIVATION_BYTES = 24
# Full-resolution feature maps of one block that are alive at once in the decoder's widest place, the upsampling to full
# resolution: 4.5 where the library convolves (two of what goes in, one of what comes out, in two layouts). With our
# own convolution an H100 wanted 3.6 at 704x384.
DECODER_MAPS = 4.5

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
    attention: str
    kv_cache: str
    decoder: str  # device of the VAE
    vae: VaeSize
    parts: tuple[Part, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Without the host."""
        return tuple(dict.fromkeys(part.device for part in self.parts if part.device != HOST))

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
    config: ModelConfig,
    geometry: Geometry,
    plan: Plan,
    precision: str,
    *,
    attention: str = "exact",
    kv_cache: str = "full",
    decoder: str,
    vae: VaeSize = WAN_VAE,
) -> MemoryPlan:
    """Bytes of one stream. `precision`, `attention`, `kv_cache` as in RuntimeSpec; `decoder`: device of the VAE."""
    parts = []
    loaded = set()
    for stage in plan.stages:
        held = _stage_bytes(config, geometry, stage, work_dtype(precision, stage.device), attention, kv_cache)
        if (stage.device, stage.layers) not in loaded:  # stages with the same layers share them
            loaded.add((stage.device, stage.layers))
            held = [*_weights(config, stage, precision), *held]
        parts += [Part(device, stage.index, name, nbytes) for device, name, nbytes in held if nbytes]
    parts += [Part(decoder, None, name, nbytes) for name, nbytes in _vae_bytes(geometry, decoder, vae).items()]
    return MemoryPlan(
        config=config,
        geometry=geometry,
        plan=plan,
        precision=precision,
        attention=attention,
        kv_cache=kv_cache,
        decoder=decoder,
        vae=vae,
        parts=tuple(parts),
    )


def weight_bytes(config: ModelConfig, layers: range, precision: str, device: str) -> int:
    """Of the model's part for `layers`, as `load_dit` will make it."""
    return _weight_bytes(config, layers, work_dtype(precision, device), precision == "fp8")


@cache
def _weight_bytes(config: ModelConfig, layers: range, dtype: torch.dtype, fp8: bool) -> int:
    modules = {name.rpartition(".")[0] for name in empty_dit(config, layers).state_dict()}
    nbytes = _module_bytes(config, dtype, fp8)
    return sum(nbytes[module] for module in modules)


@cache
def _module_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> dict[str, int]:
    nbytes: dict[str, int] = {}
    for name, tensor in _laid_out(config, dtype, fp8).state_dict().items():
        module = name.rpartition(".")[0]
        nbytes[module] = nbytes.get(module, 0) + tensor.nbytes
    return nbytes


@cache
def _laid_out(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> CausalDiT:
    # Laying out fp8 takes seconds at full size: once for the whole model, whichever cuts are looked at.
    return planned_dit(config, dtype=dtype, fp8=fp8)


@cache
def _layer_bytes(config: ModelConfig, layer: int, dtype: torch.dtype, fp8: bool) -> tuple[int, int]:
    """On the device, and as an image in host memory."""
    tensors = layer_tensors(_laid_out(config, dtype, fp8), config, layer)
    return sum(tensor.nbytes for tensor in tensors.values()), image_bytes(tensors)


def _images(config: ModelConfig, stage: StageSpec, precision: str) -> list[int]:
    dtype = work_dtype(precision, stage.device)
    return [_layer_bytes(config, layer, dtype, precision == "fp8")[1] for layer in stage.offload.weights]


def _weights(config: ModelConfig, stage: StageSpec, precision: str) -> list[tuple[str, str, int]]:
    """(device, name, bytes)"""
    dtype = work_dtype(precision, stage.device)
    away = sum(_layer_bytes(config, layer, dtype, precision == "fp8")[0] for layer in stage.offload.weights)
    images = _images(config, stage, precision)
    return [
        (stage.device, "weights", weight_bytes(config, stage.layers, precision, stage.device) - away),
        (stage.device, "buffers for weights", max(images[0::2], default=0) + max(images[1::2], default=0)),
        (HOST, "weights", sum(images)),
    ]


def _stage_bytes(
    config: ModelConfig, geometry: Geometry, stage: StageSpec, dtype: torch.dtype, attention: str, kv_cache: str
) -> list[tuple[str, str, int]]:
    """(device, name, bytes)"""
    steps, layers, rings = len(stage.steps), len(stage.layers), len(stage.offload.rings)
    row = config.dim * dtype.itemsize  # one token's keys, or its values
    ring = _ring_bytes(config, geometry, dtype, attention, kv_cache)
    token = token_bytes(config.heads, config.head_dim, dtype, attention, kv_cache)
    whole = ring + geometry.sink_tokens * token
    sink = layers * 2 * geometry.sink_tokens * row  # a version as its prefill leaves it
    shown = layers * geometry.tokens_per_frame * row  # reference keys of the one before it, which caches still show
    # What one layer sees of keys and values in fp8 is given back its dtype.
    unpacked = kinds(dtype, attention, kv_cache).count(FP8) * row * (whole // token)
    time_tables = (steps + 1) * (6 + 1) * config.dim * FLOAT32  # every step's and the prefill's
    rotary = geometry.motion_tokens * config.head_dim * FLOAT32
    return [
        (stage.device, "block caches", (steps * layers - rings) * whole),
        (stage.device, "buffers for rings", 2 * whole if rings else 0),
        (stage.device, "attention sink", sink if stage.offload else sink + shown),
        (stage.device, "text and tables", layers * 2 * config.text_len * row + time_tables + rotary),
        (stage.device, "activations", ACTIVATION_BYTES * geometry.tokens_per_block * config.dim + unpacked),
        (HOST, "block caches", rings * ring),
        (HOST, "attention sink", VERSIONS * sink if stage.offload else 0),
    ]


def _ring_bytes(config: ModelConfig, geometry: Geometry, dtype: torch.dtype, attention: str, kv_cache: str) -> int:
    """Of one step and layer."""
    tokens = WINDOW_BLOCKS * geometry.tokens_per_block
    return tokens * token_bytes(config.heads, config.head_dim, dtype, attention, kv_cache)


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
        "VAE workspace": int(DECODER_MAPS * FRAMES_PER_BLOCK * vae.width * pixels * itemsize),
    }


def table(memory: MemoryPlan, free: Mapping[str, int] | None = None) -> str:
    """The plan as lines of text, a column per device, in GiB; with `free` also what each device has."""
    geometry, plan = memory.geometry, memory.plan
    devices = [*memory.devices, *([HOST] if memory.on(HOST) else [])]
    rows = [("GiB", devices)]
    for name in dict.fromkeys(part.name for part in memory.parts):
        label = f"{name} (estimate)" if name in ESTIMATED else name
        held = [memory.on(device, name) for device in devices]
        rows.append((label, [gib(nbytes) if nbytes else "-" for nbytes in held]))
    rows.append(("needed", [gib(memory.on(device)) for device in devices]))
    if free and not free.keys().isdisjoint(devices):
        rows.append(("free", [gib(free[device]) if device in free else "?" for device in devices]))
    first = max(len(label) for label, _ in rows)
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    lines = [label.ljust(first) + "".join(cell.rjust(width) for cell in cells) for label, cells in rows]
    title = f"{geometry.width}x{geometry.height}, {plan.steps} steps, precision {memory.precision}, plan {plan.name}"
    lines += [_traffic(memory, stage) for stage in plan.stages if stage.offload]
    return "\n".join([f"{title}, {gib(memory.total)} GiB in all", *lines])


def streamed_bytes(memory: MemoryPlan, stage: StageSpec) -> int:
    """Bytes that come from host memory in one step, once the window is full; the mean of the stage's steps."""
    dtype = work_dtype(memory.precision, stage.device)
    ring = _ring_bytes(memory.config, memory.geometry, dtype, memory.attention, memory.kv_cache)
    seen = ring * (WINDOW_BLOCKS - 1) // WINDOW_BLOCKS  # the slot that is being written does not come
    return len(stage.offload.rings) * seen // len(stage.steps) + sum(_images(memory.config, stage, memory.precision))


def _traffic(memory: MemoryPlan, stage: StageSpec) -> str:
    nbytes, offload = streamed_bytes(memory, stage), stage.offload
    return (
        f"{stage.device} reads {gib(nbytes)} GiB from host memory in every step, {nbytes / BUS:.2f} s at "
        f"{BUS / 1e9:.0f} GB/s: {len(offload.rings)} of {len(stage.steps) * len(stage.layers)} rings, "
        f"weights of {len(offload.weights)} of {len(stage.layers)} layers"
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}"
