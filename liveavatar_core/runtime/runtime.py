"""The weights of one process: which parts of which model are on which device now, and the one stream using them.

Nothing loads before a stream needs it, and everything held dies in `unload`.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.config import ModelConfig, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.plan import Plan, choose
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.runtime.memory import MemoryPlan, check, plan_memory, table, weight_bytes
from liveavatar_core.types import BlockRequest, Conditioning
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import WeightReader, open_weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


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

        `free(devices)` gives the bytes there are then; `free_memory`, which knows CUDA devices, if None.
        `open_model(checkpoint)` gives the tensors; another one serves a model that no file holds.
        """
        self._reserve, self._free, self._open = reserve, free or free_memory, open_model
        self._models: dict[tuple[str, range], CausalDiT] = {}
        self._resident: tuple[ModelSpec, str] | None = None  # model and precision of what is loaded
        self._streaming = threading.Lock()

    @property
    def is_streaming(self) -> bool:
        return self._streaming.locked()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of weights held per device."""
        held: dict[str, int] = {}
        for (device, _), model in self._models.items():
            held[device] = held.get(device, 0) + sum(p.numel() * p.element_size() for p in model.state_dict().values())
        return held

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

        With the stream's `geometry`, its whole memory is planned, logged and asked for before anything is loaded, and
        PlanError says what would fit if it does not. Without, only the weights are asked for.
        """
        _check_devices(spec.devices)
        plan = choose(spec.plan, steps, config.layers, spec.devices)
        precision = choose_precision(model, spec.precision)
        if self._resident != (model, precision):
            self.unload()
        needed = {(stage.device, stage.layers) for stage in plan.stages}
        for part in [part for part in self._models if part not in needed]:
            del self._models[part]
        if geometry is not None:
            self._make_room(plan_memory(config, geometry, plan, precision, decoder=spec.devices[-1]))
        for part in sorted(needed - self._models.keys(), key=str):
            device, layers = part
            if geometry is None:
                self._reserve(device, weight_bytes(config, layers, precision, device))
            self._models[part] = self._load(model, config, part, precision, progress)
        self._resident = (model, precision)
        return plan

    def _make_room(self, memory: MemoryPlan) -> None:
        """Ask the host for what the plan takes beyond the weights already here, then look whether it is there."""
        held = self.nbytes
        for device in memory.devices:
            self._reserve(device, memory.on(device) - held.get(device, 0))
        free = {device: nbytes + held.get(device, 0) for device, nbytes in self._free(memory.devices).items()}
        log.info("memory plan\n%s", table(memory, free))
        check(memory, free)

    def _load(
        self, model: ModelSpec, config: ModelConfig, part: tuple[str, range], precision: str, progress: Progress | None
    ) -> CausalDiT:
        device, layers = part
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
                progress=progress,
            )
        log.info("layers %d-%d of %s are on %s", layers.start, layers.stop - 1, model.checkpoint.name, device)
        return dit

    def stages(self, plan: Plan, geometry: Geometry, sampling: SamplingConfig, text: Tensor) -> list[Stage]:
        """New stages for one stream, in the plan's order, on what `ensure` made resident. To be run inside
        `torch.inference_mode()`."""
        return [Stage(spec, self._models[spec.device, spec.layers], geometry, sampling, text) for spec in plan.stages]

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
            with torch.inference_mode():
                stages = self.stages(plan, geometry, sampling, conditioning.text)
            # One block more than there are stages, so that no stage waits while frames are decoded.
            depth = len(stages) + 1
            with ThreadedPipeline(plan, stages, monitor) as pipeline:
                yield from denoise(
                    pipeline, conditioning, sampling, request, blocks, depth=depth, should_stop=should_stop
                )
        finally:
            self._streaming.release()

    def unload(self) -> None:
        """Drop all weights. Refused while a stream is using them."""
        if self.is_streaming:
            raise PlanError("the model is in use by a running stream; stop the stream before unloading")
        self._models.clear()
        self._resident = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def free_memory(devices: Iterable[str]) -> dict[str, int]:
    """Bytes that may be taken on each CUDA device among them, the allocator's unused blocks included."""
    free = {}
    for name in devices:
        if torch.device(name).type == "cuda":
            unused = torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
            free[name] = torch.cuda.mem_get_info(name)[0] + unused
    return free


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
            raise PlanError(f"device {name} does not exist here; CUDA devices found: {torch.cuda.device_count()}")
