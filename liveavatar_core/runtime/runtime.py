"""The weights of one process: which parts of which model are on which device now, and the one stream using them.

Nothing loads before a stream needs it, and everything held dies in `unload`.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from liveavatar_core.config import ModelConfig, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import Plan, choose
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.types import BlockRequest, Conditioning
from liveavatar_core.weights.build import empty_dit, load_dit
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import open_weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def inspect_model(model: ModelSpec) -> ModelConfig:
    """The model's shape from the files' headers; LoRAs are checked against it. Raises WeightsError. Loads nothing."""
    with open_weights(model.checkpoint) as reader:
        config = infer_config(reader.infos(), reader.config)
    for spec in model.loras:
        with open_lora(spec.path, spec.strength) as lora:
            lora.check(config)
    return config


def work_dtype(precision: str, device: str) -> torch.dtype:
    """Of activations, caches and unquantised weights."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if precision == "fp32" or (precision == "auto" and on_cpu) else torch.bfloat16


class Runtime:
    """Ordinary class; the host keeps the one instance of its process."""

    def __init__(self, reserve: Callable[[str, int], None] = lambda device, nbytes: None) -> None:
        """`reserve(device, nbytes)` is called before weights are put on a device, so that the host can make room."""
        self._reserve = reserve
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
        self, model: ModelSpec, config: ModelConfig, spec: RuntimeSpec, steps: int, progress: Progress | None = None
    ) -> Plan:
        """Make exactly the parts resident that a stream needs; keep those that already are."""
        _check_devices(spec.devices)
        plan = choose(spec.plan, steps, config.layers, spec.devices)
        if self._resident != (model, spec.precision):
            self.unload()
        needed = {(stage.device, stage.layers) for stage in plan.stages}
        for part in [part for part in self._models if part not in needed]:
            del self._models[part]
        for part in sorted(needed - self._models.keys(), key=str):
            self._models[part] = self._load(model, config, part, spec.precision, progress)
        self._resident = (model, spec.precision)
        return plan

    def _load(
        self, model: ModelSpec, config: ModelConfig, part: tuple[str, range], precision: str, progress: Progress | None
    ) -> CausalDiT:
        device, layers = part
        dtype = work_dtype(precision, device)
        with ExitStack() as files:
            reader = files.enter_context(open_weights(model.checkpoint))
            loras = [files.enter_context(open_lora(spec.path, spec.strength)) for spec in model.loras]
            parameters = sum(tensor.numel() for tensor in empty_dit(config, layers).state_dict().values())
            self._reserve(device, parameters * (1 if precision == "fp8" else dtype.itemsize))
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

    def latents(
        self,
        plan: Plan,
        geometry: Geometry,
        sampling: SamplingConfig,
        conditioning: Conditioning,
        request: Callable[[int], BlockRequest],
        blocks: int,
        should_stop: Callable[[], bool],
    ) -> Iterator[tuple[int, Tensor]]:
        """One stream on what `ensure` made resident; (block, latent) in order. One at a time per runtime."""
        if not self._streaming.acquire(blocking=False):
            raise PlanError("another Live Avatar stream is running on these devices; wait for it or stop it first")
        try:
            with torch.inference_mode():
                stages = [
                    Stage(spec, self._models[spec.device, spec.layers], geometry, sampling, conditioning.text)
                    for spec in plan.stages
                ]
            # One block more than there are stages, so that no stage waits while frames are decoded.
            depth = len(stages) + 1
            with ThreadedPipeline(plan, stages) as pipeline:
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


def _check_devices(devices: tuple[str, ...]) -> None:
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise PlanError(f"device {name!r} is not a name torch knows; use names like cuda:0 or cpu") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise PlanError(f"device {name} does not exist here; CUDA devices found: {torch.cuda.device_count()}")
