"""One configuration measured: load, start, forwards, decoder, and a whole stream from sound to frames on the host.

Everything runs through the runtime as a video does. Conditions other than the sound are random numbers.
"""

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from liveavatar_core.bench.ceilings import GIB, Ceilings, attention_flops, product_flops
from liveavatar_core.bench.clock import Marks, cuda_devices, profile, synchronise
from liveavatar_core.config import ModelConfig, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.encoders.audio_features import FeatureStream, SpeechEncoder
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import WanVAE
from liveavatar_core.errors import ConfigError
from liveavatar_core.geometry import (
    DEFAULT_FPS,
    FRAMES_DROPPED,
    FRAMES_PER_BLOCK,
    LATENTS_PER_BLOCK,
    SAMPLE_RATE,
    WINDOW_BLOCKS,
    Geometry,
)
from liveavatar_core.pipeline.plan import PREFILL, Plan
from liveavatar_core.pipeline.stream import FrameChunk, VideoDecoder, frame_chunks
from liveavatar_core.runtime.memory import HOST, MemoryPlan, plan_memory, streamed_bytes
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.types import BlockRequest, Conditioning, Payload

BLOCKS = 20
SETTLED = 2 * WINDOW_BLOCKS + 1  # blocks until the window is full and every slot of it has its graph
UNSEEN = 2  # blocks in flight behind the last one that is timed, so that it is like those before
FORWARDS = 24  # timed one by one
DECODED = 6  # blocks decoded alone

PARTS = {  # what is measured together -> parts of the memory plan
    "weights": ("weights", "buffers for weights"),
    "caches": ("block caches", "buffers for rings", "attention sink", "text and tables"),
    "activations": ("activations",),
    "decoder": ("VAE caches", "VAE workspace"),
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to measure, and with what beside the model. `runtime` says precision and decoder, neither is auto."""

    model: ModelSpec
    config: ModelConfig
    runtime: RuntimeSpec
    sampling: SamplingConfig
    geometry: Geometry
    vae: WanVAE  # or whatever encodes frames like one
    decoder: Callable[[], VideoDecoder]  # a fresh one, on `runtime.decoder`
    speech: SpeechEncoder
    blocks: int = BLOCKS  # of the stream

    def __post_init__(self) -> None:
        if self.blocks < SETTLED + WINDOW_BLOCKS:
            raise ConfigError(
                f"blocks is {self.blocks}; a stream needs {SETTLED} until it has settled, "
                f"give at least {SETTLED + WINDOW_BLOCKS}"
            )

    @property
    def devices(self) -> tuple[str, ...]:
        """Without repetition, the decoder's included."""
        return tuple(dict.fromkeys((*self.runtime.devices, self.runtime.decoder)))


def settings(spec: RuntimeSpec, sampling: SamplingConfig) -> dict:
    """What tells lines apart."""
    return {
        "plan": spec.plan,
        "precision": spec.precision,
        "attention": spec.attention,
        "kv_cache": spec.kv_cache,
        "vram_cap_gib": spec.vram,
        "skip_last_step": sampling.skip_last_step,
    }


@torch.inference_mode()
def measure(runtime: Runtime, case: Case, ceilings: Ceilings, say: Say = lambda text: None) -> dict:
    """Figures by name, as they go into a JSON line. `say` is told what happens, often, and may raise to end it.

    Raises PlanError where the configuration does not fit.
    """
    cuda = cuda_devices(case.devices)
    gc.collect()
    say("encoding picture and sound, so that encoders are warm")
    conditioning, portrait_ms = _conditioning(case, cuda)
    _features(case).block(0)
    say("loading the model")
    started = time.perf_counter()
    plan = runtime.ensure(
        case.model, case.config, case.runtime, case.sampling.evaluations, _percent(say), geometry=case.geometry
    )
    synchronise(cuda)
    load_s = time.perf_counter() - started
    held = {"weights": sum(nbytes for device, nbytes in runtime.nbytes.items() if device != HOST)}
    memory = _planned(case, plan)
    forwards = _measure_forwards(runtime, plan, case, conditioning, held, say)
    gc.collect()  # its caches make room for the stream's
    decoder = _measure_decoder(case, conditioning, held, say)
    stream = _measure_stream(runtime, plan, case, conditioning, say)
    seen = forwards["kernels_ms"], decoder["vae_kernels_ms"]
    kernels_ms = None if None in seen else plan.steps * seen[0] + seen[1]
    held[HOST] = runtime.nbytes.get(HOST, 0)
    return {
        **settings(case.runtime, case.sampling),
        "plan": plan.name,
        **forwards,
        **_against_floor(forwards, memory, ceilings),
        **decoder,
        **stream,
        "gpu_idle": _idle(kernels_ms, len(cuda) * stream["block_ms"]),
        **_against_plan(memory, held, cuda),
        "load_s": round(load_s, 1),
        "portrait_ms": round(portrait_ms, 1),
    }


class _Loop:
    """The stages of one stream, driven by one thread: forwards back to back, with nothing else on the GPU."""

    def __init__(self, runtime: Runtime, plan: Plan, case: Case, conditioning: Conditioning) -> None:
        self._plan, self._config = plan, case.config
        self._stages = runtime.stages(plan, case.geometry, case.sampling, conditioning.text)
        for row in plan.rows:
            payload = Payload(PREFILL, PREFILL, sink=0, condition=(conditioning.reference, conditioning.motion))
            for spec in row:
                payload = self._run(spec.index, payload)

    def _run(self, index: int, payload: Payload) -> Payload:
        stage = self._stages[index]
        with torch.cuda.device(stage.device) if stage.device.type == "cuda" else nullcontext():
            return stage.run(payload)

    def forwards(self, blocks: Iterable[int]) -> Iterator[int]:
        """Yields the block after each of its forwards, without waiting for the GPU."""
        for block in blocks:
            features = torch.randn(1, self._config.audio_states, self._config.audio_dim, FRAMES_PER_BLOCK)
            payload = Payload(block, step=0, sink=0, request=BlockRequest(block, features))
            spec = self._plan.rows[0][0]
            while spec is not None:
                step = payload.step
                payload = self._run(spec.index, payload)
                spec = self._plan.next_stage(spec, payload.step)
                if payload.step > step:
                    yield block


def _measure_forwards(
    runtime: Runtime, plan: Plan, case: Case, conditioning: Conditioning, held: dict[str, int], say: Say
) -> dict:
    cuda, steps = cuda_devices(case.devices), plan.steps
    say("first block, cold")
    deque(_Loop(runtime, plan, case, conditioning).forwards([0]), 0)
    gc.collect()
    synchronise(cuda)
    before = _allocated(cuda)
    times = [time.perf_counter()]
    loop = _Loop(runtime, plan, case, conditioning)
    synchronise(cuda)
    times.append(time.perf_counter())
    resident = _allocated(cuda)
    held["caches"] = resident - before
    _reset_peaks(cuda)
    deque(loop.forwards([0]), 0)
    synchronise(cuda)
    times.append(time.perf_counter())
    for block in loop.forwards(range(1, SETTLED)):
        say(f"filling the window: block {block} of {SETTLED - 1}")
    last = SETTLED + max(2, FORWARDS // steps)
    marks, host = Marks(case.devices), []
    marks.mark()
    started = time.perf_counter()
    for block in loop.forwards(range(SETTLED, last)):
        host.append(1000 * (time.perf_counter() - started))
        marks.mark()
        say(f"timing forwards: block {block} of {last - 1}")
        started = time.perf_counter()
    periods = marks.periods()
    forward_ms = statistics.median(periods)
    seen = profile(lambda: deque(loop.forwards([last]), 0), case.devices, parts=steps)
    held["activations"] = sum(_peaks(cuda)) - resident
    return {
        "forward_ms": round(forward_ms, 2),
        "forward_ms_range": [round(min(periods), 2), round(max(periods), 2)],
        "kernels_ms": _rounded(seen.kernels_ms),
        "forward_idle": _idle(seen.kernels_ms, forward_ms),
        "host_ms": round(statistics.median(host), 2),
        "breakdown_ms": seen.kinds,
        "slowest": seen.slowest,
        "sink_ms": round(1000 * (times[1] - times[0]), 1),
        "first_block_ms": round(1000 * (times[2] - times[1]), 1),
    }


def _measure_decoder(case: Case, conditioning: Conditioning, held: dict[str, int], say: Say) -> dict:
    """Latents that are ready, to pixels on the host."""
    cuda = cuda_devices(case.devices)
    say("timing the decoder")
    before = _allocated(cuda)
    _reset_peaks(cuda)
    blocks = 2 + DECODED + 1
    latent = conditioning.motion[:, -LATENTS_PER_BLOCK:]
    chunks = frame_chunks(
        ((block, latent) for block in range(blocks)),
        case.decoder(),
        conditioning.motion,
        blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED,
    )
    with closing(chunks):
        times = []
        for _ in range(2 + DECODED):
            _on_host(next(chunks))
            times.append(time.perf_counter())
        seen = profile(lambda: _on_host(next(chunks)), case.devices)
    held["decoder"] = sum(_peaks(cuda)) - before
    return {
        "vae_ms": round(1000 * statistics.median(_differences(times[1:])), 2),
        "vae_kernels_ms": _rounded(seen.kernels_ms),
        "vae_breakdown_ms": seen.kinds,
        "vae_slowest": seen.slowest,
    }


def _measure_stream(runtime: Runtime, plan: Plan, case: Case, conditioning: Conditioning, say: Say) -> dict:
    """A stream on a warm runtime: sound in, frames on the host out, decoder included; then how soon the next begins."""
    cuda = cuda_devices(case.devices)
    synchronise(cuda)
    _reset_peaks(cuda)
    times, allocated = [], []
    with closing(_play(runtime, plan, case, conditioning, {})) as chunks:
        for block in range(case.blocks):
            next(chunks)
            times.append(time.perf_counter())
            allocated.append(_allocated(cuda))
            say(f"timing the stream: block {block + 1} of {case.blocks}")
    steady = 1000 * (times[-1] - times[SETTLED - 1]) / (case.blocks - SETTLED)
    periods = [1000 * seconds for seconds in _differences(times[SETTLED - 1 :])]
    quarter = max(1, len(periods) // 4)
    say("timing the first frames")
    # Of a second stream: the first one's allocations are new to the streams of the GPU that it runs on.
    gc.collect()
    synchronise(cuda)
    came: dict[str, float] = {}
    started = time.perf_counter()
    with closing(_play(runtime, plan, case, conditioning, came)) as chunks:
        next(chunks)
        came["ttff_ms"] = time.perf_counter()
    return {
        "fps": round(1000 * FRAMES_PER_BLOCK / steady, 2),
        "block_ms": round(steady, 1),
        "block_ms_first_quarter": round(statistics.median(periods[:quarter]), 1),
        "block_ms_last_quarter": round(statistics.median(periods[-quarter:]), 1),
        "growth_mib": round((max(allocated[-quarter:]) - max(allocated[SETTLED : SETTLED + quarter])) / 2**20, 1),
        "blocks": case.blocks,
        **{name: round(1000 * (when - started), 1) for name, when in came.items()},
        "peak_gib": _gib(max(_peaks(cuda))) if cuda else None,
        "reserved_gib": _gib(max(map(torch.cuda.max_memory_reserved, cuda))) if cuda else None,
    }


def _play(
    runtime: Runtime, plan: Plan, case: Case, conditioning: Conditioning, came: dict[str, float]
) -> Iterator[Tensor]:
    """The frames of each block, on the host. `came` is told when the first features and latents were there."""
    blocks = case.blocks + UNSEEN
    features = _features(case)

    def request(block: int) -> BlockRequest:
        made = BlockRequest(block, features.block(block).unsqueeze(0))
        came.setdefault("features_ms", time.perf_counter())
        return made

    def watched(latents: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
        for block, latent in latents:
            came.setdefault("first_latents_ms", time.perf_counter())
            yield block, latent

    latents = runtime.latents(
        plan, case.geometry, case.sampling, conditioning, request, blocks, should_stop=lambda: False
    )
    with closing(latents):
        frames = blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED
        for chunk in frame_chunks(watched(latents), case.decoder(), conditioning.motion, frames):
            yield _on_host(chunk)


def _planned(case: Case, plan: Plan) -> MemoryPlan:
    """As the runtime made it."""
    spec = case.runtime
    return plan_memory(
        case.config,
        case.geometry,
        plan,
        spec.precision,
        attention=spec.attention,
        kv_cache=spec.kv_cache,
        decoder=plan.decoder,
    )


def _against_plan(memory: MemoryPlan, held: dict[str, int], cuda: list[torch.device]) -> dict:
    """Planned GiB of the fullest device; and by part, of all devices, [planned, measured]."""
    planned = {
        part: sum(memory.on(device, name) for device in memory.devices for name in names)
        for part, names in PARTS.items()
    } | {HOST: memory.on(HOST)}
    return {
        "planned_gib": _gib(max(memory.on(device) for device in memory.devices)),
        "held_gib": {part: [_gib(planned[part]), _gib(nbytes) if cuda else None] for part, nbytes in held.items()},
    }


def _against_floor(forwards: dict, memory: MemoryPlan, ceilings: Ceilings) -> dict:
    """What the card could do; and, of a stage that streams from host memory, what its bus could do."""
    config, geometry, forward_ms = memory.config, memory.geometry, forwards["forward_ms"]
    floor = ceilings.forward_floor_ms(config, geometry, fp8=memory.precision == "fp8", attention=memory.attention)
    flops = product_flops(config, geometry) + attention_flops(config, geometry)
    result = {"tflops": round(flops / forward_ms / 1e9, 1)}
    streamed = sum(streamed_bytes(memory, stage) for stage in memory.plan.stages)
    if streamed and ceilings.h2d_gbs:
        bus_ms = streamed / ceilings.h2d_gbs / 1e6
        bound = max(forwards["kernels_ms"] or floor, bus_ms)
        result |= {"streamed_gib": _gib(streamed), "bus_ms": round(bus_ms, 2), "of_bound": round(bound / forward_ms, 3)}
        floor = max(floor, bus_ms)
    return {"forward_floor_ms": round(floor, 2), "of_floor": round(floor / forward_ms, 3), **result}


def _conditioning(case: Case, cuda: list[torch.device]) -> tuple[Conditioning, float]:
    """Of a random picture and prompt, and the milliseconds that the picture took."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(77, case.config.text_dim, generator=generator)
    picture = torch.rand(3, case.geometry.height, case.geometry.width, generator=generator) * 2 - 1
    started = time.perf_counter()
    portrait = portrait_latents(case.vae, picture)
    synchronise(cuda)
    return Conditioning(text, *portrait), 1000 * (time.perf_counter() - started)


def _features(case: Case) -> FeatureStream:
    """Of random sound, as long as the stream."""
    seconds = (case.blocks + UNSEEN) * FRAMES_PER_BLOCK / DEFAULT_FPS
    sound = 0.1 * torch.randn(round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
    return FeatureStream(sound, case.speech, fps=DEFAULT_FPS, lead_frames=FRAMES_DROPPED)


def _on_host(chunk: FrameChunk) -> Tensor:
    return chunk.frames.cpu()


def _differences(times: list[float]) -> list[float]:
    return [b - a for a, b in zip(times, times[1:], strict=False)]


def _percent(say: Say) -> Callable[[int, int], None]:
    return lambda done, total: say(f"loading the model: {100 * done // max(total, 1)} %")


def _idle(kernels_ms: float | None, period_ms: float) -> float | None:
    """The share of a period in which no kernel runs, if they run one after another: a profiler would add to it."""
    return None if kernels_ms is None else round(max(0.0, 1 - kernels_ms / period_ms), 4)


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 2)


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 2)


def _allocated(cuda: list[torch.device]) -> int:
    return sum(torch.cuda.memory_allocated(device) for device in cuda)


def _peaks(cuda: list[torch.device]) -> list[int]:
    return [torch.cuda.max_memory_allocated(device) for device in cuda]


def _reset_peaks(cuda: list[torch.device]) -> None:
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
