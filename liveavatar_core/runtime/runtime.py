"""The weights of one process: which parts of which model are on which device now, and the one stream using them.

Nothing loads before a stream needs it, and everything held dies in `unload`.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from liveavatar_core.config import ModelConfig, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.model.host_memory import HostMemory
from liveavatar_core.pipeline.costs import work
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.plan import Machine, Plan, StageSpec, choose
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import Pipeline, denoise
from liveavatar_core.pipeline.threads import STALLED, ThreadedPipeline
from liveavatar_core.runtime.choice import Choice, choose_plan
from liveavatar_core.runtime.fitting import OUTSIDE, asked, check, fit, room
from liveavatar_core.runtime.memory import HOST, MemoryPlan, plan_memory, table, weight_bytes
from liveavatar_core.runtime.probe import measure
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import WeightReader, open_weights

if TYPE_CHECKING:
    from liveavatar_core.runtime.cluster import Cluster

log = logging.getLogger(__name__)

KEPT_FREE = 2 * 1024**3  # bytes of host memory that stay for everybody else

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Part = tuple[str, range, tuple[int, ...]]  # device, layers, those of them whose weights are in host memory
Formats = tuple[Geometry | None, str, str]  # with attention and kv_cache: what decides the sizes of a stream's memory


def inspect_model(model: ModelSpec) -> ModelConfig:
    """The model's shape from the files' headers; LoRAs are checked against it. Raises WeightsError. Loads nothing."""
    with open_weights(model.checkpoint) as reader:
        config = infer_config(reader.infos(), reader.config)
        if reader.record is not None:
            reader.record.check(model.checkpoint, model.loras)
    for spec in model.loras:
        with open_lora(spec.path, spec.strength) as lora:
            lora.check(config)
    return config


def choose_precision(model: ModelSpec, precision: str) -> str:
    """`auto` is what a converted file was made for; other precisions, and auto for other files, stay."""
    if precision != "auto":
        return precision
    with open_weights(model.checkpoint) as reader:
        return precision if reader.record is None else reader.record.precision


class Runtime:
    """Ordinary class; the host keeps the one instance of its process."""

    def __init__(
        self,
        reserve: Callable[[str, int], None] = lambda device, nbytes: None,
        free: Callable[[Iterable[str]], Mapping[str, int]] | None = None,
        open_model: Callable[[Path], WeightReader] = open_weights,
    ) -> None:
        """`reserve(device, nbytes)` is called before a device is used, so that the host can make room.

        `free(devices)` gives the bytes there are then; `free_memory`, which knows CUDA devices and the host, if None.
        `open_model(checkpoint)` gives the tensors; another one serves a model that no file holds.
        """
        self._reserve, self._free, self._open = reserve, free or free_memory, open_model
        self._models: dict[Part, CausalDiT] = {}
        self._formats: Formats = None, "exact", "full"  # of the next stream
        self._host: dict[StageSpec, tuple[Formats, HostMemory]] = {}  # of stages with an offload
        self._resident: tuple[ModelSpec, str] | None = None  # model and precision of what is loaded
        self.memory: MemoryPlan | None = None  # of the last stream that was prepared, if its size was known
        self._fitted: dict[tuple[MemoryPlan, float | None], MemoryPlan] = {}  # the last plan, as asked and as made
        self._cluster: Cluster | None = None
        self._last: ThreadedPipeline | None = None  # of the last stream in this process
        self._streaming = threading.Lock()

    @property
    def is_streaming(self) -> bool:
        return self._streaming.locked()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held between streams, by device: weights; and all that is in host memory."""
        held: dict[str, int] = {}
        for (device, *_), model in self._models.items():
            held[device] = held.get(device, 0) + model.nbytes
        hosted = [model.hosted.host_bytes for model in self._models.values() if model.hosted is not None]
        if hosted or self._host:
            held[HOST] = sum(hosted) + sum(memory.nbytes for _, memory in self._host.values())
        return held

    def choice(
        self, model: ModelSpec, config: ModelConfig, spec: RuntimeSpec, steps: int, geometry: Geometry
    ) -> Choice:
        """The plan of a stream, what it will need and do, and why. Loads nothing; several cards are timed, once."""
        _check_devices(spec.devices)
        precision = choose_precision(model, spec.precision)
        machine = measure(spec.devices) if len(set(spec.devices)) > 1 else Machine()
        return choose_plan(config, geometry, spec, precision, steps, room(capacity(spec.devices), spec.vram), machine)

    def placed(
        self, model: ModelSpec, config: ModelConfig, spec: RuntimeSpec, steps: int, geometry: Geometry
    ) -> RuntimeSpec:
        """`spec` with the VAE's device decided, since the VAE is needed before the model is loaded."""
        if spec.cluster is None:
            _check_devices((*spec.devices, *([] if spec.decoder == "auto" else [spec.decoder])))
        if spec.decoder != "auto":
            return spec
        if spec.cluster is not None:  # its devices are other processes', the VAE is in this one
            return replace(spec, decoder="cuda:0" if torch.cuda.is_available() else "cpu")
        if len(set(spec.devices)) == 1:
            return replace(spec, decoder=spec.devices[0])
        return replace(spec, decoder=self.choice(model, config, spec, steps, geometry).plan.decoder)

    def ensure(
        self,
        model: ModelSpec,
        config: ModelConfig,
        spec: RuntimeSpec,
        steps: int,
        progress: Progress | None = None,
        *,
        geometry: Geometry | None = None,
    ) -> Plan:
        """Make exactly the parts resident that a stream needs; keep those that already are.

        With the stream's `geometry`, its whole memory is planned, logged and asked for before anything is loaded; what
        a GPU has no room for is to be streamed from host memory, as the plan says that comes back, and PlanError says
        what would fit if not even that is enough. Without, only the weights are asked for.
        """
        precision = choose_precision(model, spec.precision)
        if spec.cluster is not None:
            return self._ensure_cluster(model, config, spec, steps, precision, geometry)
        _check_devices(spec.devices)
        if self.is_streaming:
            raise PlanError("another Live Avatar stream is running on these devices; wait for it or stop it first")
        if self._last is not None and not self._last.ended(STALLED):
            raise PlanError(
                f"the stream before, though stopped, is in the middle of a hop since more than {STALLED:g} s, and uses "
                "the model; if its device is not just slow, start the program again"
            )
        if self._resident != (model, precision) or self._cluster is not None:
            self.unload()
        if geometry is None:
            self.memory, plan = None, choose(spec.plan, steps, config.layers, spec.devices)
        else:
            choice = self.choice(model, config, spec, steps, geometry)
            log.info("plan %s", choice.why)
            plan = self._make_room(choice.memory, spec.vram)
        needed = {_part(stage) for stage in plan.stages}
        for part in [part for part in self._models if part not in needed]:
            del self._models[part]
        self._formats = formats = geometry, spec.attention, spec.kv_cache
        known, self._host = self._host, {}
        for stage in plan.stages:
            if stage.offload:
                fresh = formats, HostMemory(torch.device(stage.device))
                self._host[stage] = known[stage] if stage in known and known[stage][0] == formats else fresh
        del known
        for part in sorted(needed - self._models.keys(), key=str):
            device, layers, _ = part
            if geometry is None:
                self._reserve(device, weight_bytes(config, layers, precision, device))
            self._models[part] = self._load(model, config, part, precision, progress)
        self._resident = (model, precision)
        return plan

    def _ensure_cluster(
        self,
        model: ModelSpec,
        config: ModelConfig,
        spec: RuntimeSpec,
        steps: int,
        precision: str,
        geometry: Geometry | None,
    ) -> Plan:
        """The same in the processes of a cluster, where every device is one process's own and no host asks for room."""
        from liveavatar_core.runtime.cluster import Cluster

        if geometry is None:
            raise PlanError("stages in a cluster need the size of the stream before they are loaded; give its geometry")
        if self._cluster is None or not self._cluster.serves(spec.cluster, spec.devices):
            self.unload()
            self._cluster = Cluster(spec.cluster, spec.devices)
        decoder = spec.devices[0] if spec.decoder == "auto" else spec.decoder
        todo = work(config, geometry, precision)
        plan = choose(spec.plan, steps, config.layers, spec.devices, work=todo, decoder=decoder)
        memory = plan_memory(
            config, geometry, plan, precision, attention=spec.attention, kv_cache=spec.kv_cache, decoder=decoder
        )
        cards = zip(spec.devices, self._cluster.memory, strict=True)
        free = room({device: nbytes - OUTSIDE for device, nbytes in cards if nbytes is not None}, spec.vram)
        memory = fit(memory, free)
        log.info("memory plan\n%s", table(memory, free))
        check(memory, free)
        self.memory, plan = memory, memory.plan
        self._cluster.ensure(plan, model, config, precision, self._open)
        self._formats = geometry, spec.attention, spec.kv_cache
        return plan

    def _make_room(self, memory: MemoryPlan, vram: float | None) -> Plan:
        """Ask the host for what the plan takes beyond the weights already here, then fit it into what is there."""
        held = self.nbytes
        wanted = asked(memory, vram)
        for device, nbytes in wanted.items():
            self._reserve(device, nbytes - held.get(device, 0))
        found = self._free([*memory.devices, HOST])
        free = room({device: nbytes + held.get(device, 0) for device, nbytes in found.items()}, vram)
        # What was good enough for the last stream is kept: free memory is never twice the same, and another split
        # would load the model again.
        fitted = self._fitted.get((memory, vram))
        if fitted is None or not fitted.fits(free):
            fitted = fit(memory, free)
        log.info("memory plan\n%s", table(fitted, free))
        check(fitted, free)
        self._fitted, self.memory = {(memory, vram): fitted}, fitted
        for device, nbytes in asked(fitted, vram).items():
            if nbytes < wanted[device]:
                self._reserve(device, nbytes - held.get(device, 0))
        return fitted.plan

    def _load(
        self, model: ModelSpec, config: ModelConfig, part: Part, precision: str, progress: Progress | None
    ) -> CausalDiT:
        device, layers, hosted = part
        dtype = work_dtype(precision, device)
        with ExitStack() as files:
            reader = files.enter_context(self._open(model.checkpoint))
            loras = [files.enter_context(open_lora(spec.path, spec.strength)) for spec in model.loras]
            dit = load_dit(
                reader,
                config,
                layers=layers,
                loras=loras,
                dtype=dtype,
                device=device,
                fp8=precision == "fp8",
                hosted=hosted,
                progress=progress,
            )
        log.info("layers %d-%d of %s are on %s", layers.start, layers.stop - 1, model.checkpoint.name, device)
        return dit

    def stages(
        self, plan: Plan, geometry: Geometry, sampling: SamplingConfig, text: Tensor, *, graphs: bool = True
    ) -> list[Stage]:
        """New stages for one stream, in the plan's order, on what `ensure` made resident. To be run inside
        `torch.inference_mode()`."""
        return [
            Stage(
                spec,
                self._models[_part(spec)],
                geometry,
                sampling,
                levels(sampling),
                text,
                graphs=graphs,
                host=self._host[spec][1] if spec.offload else None,
                attention=self._formats[1],
                kv_cache=self._formats[2],
            )
            for spec in plan.stages
        ]

    def latents(
        self,
        plan: Plan,
        geometry: Geometry,
        sampling: SamplingConfig,
        conditioning: Conditioning,
        request: Callable[[int], BlockRequest],
        blocks: int,
        should_stop: Callable[[], bool],
        monitor: Monitor | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """One stream on what `ensure` made resident; (block, latent) in order. One at a time per runtime.

        `monitor` is told what happens.
        """
        if not self._streaming.acquire(blocking=False):
            raise PlanError("another Live Avatar stream is running on these devices; wait for it or stop it first")
        try:
            with self._pipeline(plan, geometry, sampling, conditioning.text, monitor) as pipeline:
                yield from denoise(
                    pipeline, conditioning, sampling, request, blocks, depth=plan.depth, should_stop=should_stop
                )
        finally:
            self._streaming.release()

    def _pipeline(
        self, plan: Plan, geometry: Geometry, sampling: SamplingConfig, text: Tensor, monitor: Monitor | None
    ) -> Pipeline:
        if self._cluster is not None:
            return self._cluster.pipeline(plan, geometry, sampling, levels(sampling), text, self._formats[1:], monitor)
        with torch.inference_mode():
            stages = self.stages(plan, geometry, sampling, text)
        self._last = ThreadedPipeline(plan, stages, monitor)
        return self._last

    def unload(self) -> None:
        """Drop all weights, and host memory. Refused while a stream is using them."""
        if self.is_streaming:
            raise PlanError("the model is in use by a running stream; stop the stream before unloading")
        self._models.clear()
        self._host.clear()
        self._resident = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def capacity(devices: Iterable[str]) -> dict[str, int]:
    """Bytes that may be planned of each CUDA device if everybody else makes room."""
    cards = {name for name in devices if torch.device(name).type == "cuda"}
    return {name: torch.cuda.get_device_properties(name).total_memory - OUTSIDE for name in cards}


def free_memory(devices: Iterable[str]) -> dict[str, int]:
    """Bytes that may be taken on each CUDA device among them, the allocator's unused blocks included, and on the host.

    What cannot be known is left out.
    """
    free = {}
    for name in devices:
        if name == HOST:
            free |= _free_host()
        elif torch.device(name).type == "cuda":
            unused = torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
            free[name] = torch.cuda.mem_get_info(name)[0] + unused
    return free


def _free_host() -> dict[str, int]:
    try:
        from psutil import virtual_memory  # the host has it; without, nobody judges
    except ImportError:
        return {}
    return {HOST: max(0, virtual_memory().available - KEPT_FREE)}


def _part(stage: StageSpec) -> Part:
    return stage.device, stage.layers, stage.offload.weights


def as_device(name: str) -> torch.device:
    """A device by its name, there or not. Raises PlanError for a name that torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"device {name!r} is not a name torch knows; use names like cuda:0 or cpu") from error


def _check_devices(devices: tuple[str, ...]) -> None:
    for name in devices:
        device = as_device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise PlanError(f"device {name} does not exist here; CUDA devices found: {found}, use one of them or cpu")
