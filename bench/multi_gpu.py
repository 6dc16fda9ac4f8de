"""The same stream by every plan that N GPUs allow, full size, random weights: rate, start, memory, hops, equality.

    bench/multi_gpu.sh 2 --precision fp8 bf16 --vram 24
    bench/multi_gpu.sh 4 --tiny                            a toy model on the CPU

Prints one JSON line per plan, with the keys of `liveavatar_core.bench` and some more, and writes one picture of its
time line. `forward_ms` is a step of a block through the stages of a row, hops left out; `gpu_idle` counts decoding as
idle. Conditions and sound are random; the speech encoder is left out; frames are decoded and brought to the host. Every
plan's latents are compared with those of one GPU. At the end a stage is killed in mid-run, and the next run must be as
good as the first.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.bench import report
from liveavatar_core.bench.ceilings import GIB, measure_ceilings
from liveavatar_core.bench.measure import settings
from liveavatar_core.bench.stand_ins import RandomWeights, random_vae
from liveavatar_core.config import LIVE_AVATAR_14B, ModelConfig, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.random_model import DEMO_CONFIG
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE
from liveavatar_core.errors import LiveAvatarError
from liveavatar_core.geometry import FRAMES_DROPPED, FRAMES_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.pipeline.monitor import DECODER, Monitor
from liveavatar_core.pipeline.plan import Plan
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import frame_chunks
from liveavatar_core.pipeline.timeline import Timeline
from liveavatar_core.runtime.memory import plan_memory
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.types import BlockRequest, Conditioning
from liveavatar_core.weights.build import work_dtype

RANDOM = ModelSpec(Path("random weights"))
SETTLED = 2 * WINDOW_BLOCKS + 1  # blocks until the window is full and every slot of it has its graph
WARM_BLOCKS = 2  # of a stream before each that is measured
KILLED_AT = 6  # block


@dataclass(frozen=True, slots=True)
class Setting:
    config: ModelConfig
    geometry: Geometry
    sampling: SamplingConfig
    conditioning: Conditioning
    vae: WanVAE

    def request(self, block: int) -> BlockRequest:
        generator = torch.Generator().manual_seed(1000 + block)
        shape = (1, self.config.audio_states, self.config.audio_dim, FRAMES_PER_BLOCK)
        return BlockRequest(block, torch.randn(shape, generator=generator))


class Failing:
    """A stage that fails at its first hop of a given block."""

    failed = 0.0  # when

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __getattr__(self, name: str):
        return getattr(self._stage, name)

    def run(self, payload):
        if payload.block == KILLED_AT:
            Failing.failed = time.perf_counter()
            raise RuntimeError("killed on purpose")
        return self._stage.run(payload)


class Breakable(Runtime):
    """A runtime of which one stage can be made to fail, and that may do without CUDA graphs."""

    broken: int | None = None
    graphs = True

    def stages(self, *args) -> list[Stage]:
        stages = super().stages(*args, graphs=self.graphs)
        return [Failing(stage) if stage.spec.index == self.broken else stage for stage in stages]


@dataclass(slots=True)
class Run:
    latents: list[Tensor]
    times: list[float]  # when each block's frames were on the host
    begun: float
    monitor: Monitor


@torch.inference_mode()
def stream(runtime: Runtime, plan, setting: Setting, blocks: int) -> Run:
    run = Run([], [], time.perf_counter(), Monitor())
    latents = runtime.latents(
        plan,
        setting.geometry,
        setting.sampling,
        setting.conditioning,
        setting.request,
        blocks,
        should_stop=lambda: False,
        monitor=run.monitor,
    )

    def kept():
        for block, latent in latents:
            run.latents.append(latent.cpu())
            yield block, latent

    frames = blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED
    with closing(latents):
        for chunk in frame_chunks(kept(), StreamDecoder(setting.vae), setting.conditioning.motion, frames):
            chunk.frames.cpu()
            run.times.append(time.perf_counter())
            run.monitor.decoded(chunk.block)
    return run


def cards() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def measure(runtime: Breakable, spec: RuntimeSpec, setting: Setting, blocks: int) -> tuple[dict, Plan, Run]:
    runtime.unload()  # so that the peak is this plan's alone
    for card in cards():
        torch.cuda.reset_peak_memory_stats(card)
    started = time.perf_counter()
    plan = runtime.ensure(RANDOM, setting.config, spec, setting.sampling.evaluations, geometry=setting.geometry)
    load_s = time.perf_counter() - started
    if str(setting.vae.device) != plan.decoder:
        setting.vae.to(plan.decoder)
    stream(runtime, plan, setting, WARM_BLOCKS)
    run = stream(runtime, plan, setting, blocks)
    begin, end = run.times[SETTLED - 1], run.times[-1]
    spans = run.monitor.spans
    hops = [s for s in spans if s.kind == "compute" and s.stage != DECODER and s.block >= WINDOW_BLOCKS]
    copies = [1000 * span.seconds for span in spans if span.kind == "copy" and span.block >= WINDOW_BLOCKS]
    steady = (end - begin) / (blocks - SETTLED)
    busy: dict[str, float] = {}
    for span in hops:
        device = plan.stages[span.stage].device
        busy[device] = busy.get(device, 0.0) + max(0.0, min(span.end, end) - max(span.begin, begin))
    figures = {
        "vae": plan.decoder,
        "stages": [
            f"{s.device} steps {s.steps.start}-{s.steps.stop - 1} layers {s.layers.start}-{s.layers.stop - 1}"
            for s in plan.stages
        ],
        "fps": round(FRAMES_PER_BLOCK / steady, 2),
        "block_ms": round(1000 * steady, 1),
        "ttff_ms": round(1000 * (run.times[0] - run.begun), 1),
        "stage_ms": [
            round(1000 * statistics.median(span.seconds for span in hops if span.stage == s.index), 2)
            for s in plan.stages
        ],
        "host_ms": round(1000 * statistics.median(span.host for span in hops), 2),
        "hop_ms": round(statistics.median(copies), 3) if copies else None,
        "utilisation": {device: round(seconds / (end - begin), 4) for device, seconds in busy.items()},
        "peak_gib": {str(card): round(torch.cuda.max_memory_allocated(card) / GIB, 2) for card in cards()},
        "late_blocks": len(run.monitor.late),
        "blocks": blocks,
        "load_s": round(load_s, 1),
        "why": runtime.choice(RANDOM, setting.config, spec, plan.steps, setting.geometry).why,
    }
    memory = plan_memory(
        setting.config,
        setting.geometry,
        plan,
        spec.precision,
        attention=spec.attention,
        kv_cache=spec.kv_cache,
        decoder=plan.decoder,
    )
    decoded = [span.seconds for span in spans if span.stage == DECODER and span.block >= WINDOW_BLOCKS]
    figures |= {
        "forward_ms": round(statistics.fmean(sum(figures["stage_ms"][s.index] for s in row) for row in plan.rows), 2),
        "gpu_idle": round(1 - statistics.fmean(figures["utilisation"].values()), 4),
        "vae_ms": round(1000 * statistics.median(decoded), 2),
        "planned_gib": round(max(memory.on(device) for device in memory.devices) / GIB, 2),
    }
    return figures, plan, run


def floor_ms(setting: Setting, device: str, precision: str) -> float:
    """What a card could do at best, at the rates of this run."""
    config, geometry = setting.config, setting.geometry
    ceilings = measure_ceilings(config, geometry, device, work_dtype(precision, device), ["exact"])
    return round(ceilings.forward_floor_ms(config, geometry, fp8=precision == "fp8", attention="exact"), 2)


def keep(run: Run, title: str, plan: Plan, path: Path) -> None:
    """The time line as a picture; and as numbers, which `liveavatar_core.pipeline.timeline` can draw elsewhere if
    Pillow is missing here."""
    timeline = Timeline.of(run.monitor, plan, title, depth=plan.depth, reanchor=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    timeline.write(path.with_suffix(".json"))
    with suppress(ImportError):
        timeline.picture().save(path)


def specs(options: argparse.Namespace, devices: tuple[str, ...]) -> list[tuple[str, RuntimeSpec]]:
    """Name and settings of every run, one GPU first."""
    count = len(devices)
    plans = [("single", devices[:1], "single"), (f"tpp({count})", devices, "tpp"), (f"ring({count})", devices, "ring")]
    if count == 4:
        plans.append(("2x2", devices, "2x2"))
    wanted = [(name, used, plan) for name, used, plan in plans if not options.plans or plan in options.plans]
    found = []
    for precision in options.precision:
        found += [(f"{name} {precision}", RuntimeSpec(used, plan, precision)) for name, used, plan in wanted]
        if options.vram:
            capped = RuntimeSpec(devices, "ring", precision, vram=options.vram)
            found.append((f"ring({count}) {precision} in {options.vram:g} GiB", capped))
    return found


def kill(runtime: Breakable, spec: RuntimeSpec, setting: Setting, want: list[Tensor] | None) -> dict:
    """A stage fails in mid-run: how long until that is known, what is said, and is the next run as good."""
    plan = runtime.ensure(RANDOM, setting.config, spec, setting.sampling.evaluations, geometry=setting.geometry)
    runtime.broken = len(plan.stages) - 1
    try:
        stream(runtime, plan, setting, KILLED_AT + 4)
        message = "no error came"
    except LiveAvatarError as error:
        message = str(error)
    seconds = time.perf_counter() - Failing.failed
    runtime.broken = None
    again = stream(runtime, plan, setting, SETTLED)
    equal = want and all(torch.equal(a, b) for a, b in zip(again.latents, want, strict=False))
    return {"killed": message, "error_after_s": round(seconds, 3), "next_run_equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="more than there are: each is taken several times")
    parser.add_argument("--precision", nargs="+", default=None, choices=["fp8", "bf16", "fp32"])
    parser.add_argument("--plans", nargs="+", help="only these, like single ring")
    parser.add_argument("--size", default=None, help="704x384")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--vram", type=float, help="another ring with this many GiB of each GPU")
    parser.add_argument("--out", type=Path, default=Path("out/multi_gpu"))
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--commit", help="of this code, where it lies in no git clone")
    options = parser.parse_args()
    options.precision = options.precision or ["fp32" if options.tiny else "fp8"]
    config = DEMO_CONFIG if options.tiny else LIVE_AVATAR_14B
    count = min(options.gpus, torch.cuda.device_count())
    devices = tuple("cpu" if options.tiny else f"cuda:{i * count // options.gpus}" for i in range(options.gpus))
    width, height = (int(side) for side in (options.size or ("64x64" if options.tiny else "704x384")).split("x"))
    geometry = Geometry(height, width)
    generator = torch.Generator().manual_seed(0)
    vae = random_vae(8 if options.tiny else 96, devices[-1])
    with torch.inference_mode():
        portrait = portrait_latents(vae, torch.rand(3, height, width, generator=generator) * 2 - 1)
    conditioning = Conditioning(torch.randn(77, config.text_dim, generator=generator), *portrait)
    setting = Setting(config, geometry, SamplingConfig(seed=1), conditioning, vae)
    runtime = Breakable(open_model=lambda path: RandomWeights(config, devices[0]))
    runtime.graphs = not options.eager
    about = {
        "command": " ".join(["bench/multi_gpu.sh", str(options.gpus), *sys.argv[3:]]),
        "commit": options.commit or report.commit(),
        "weights": "random",
        "gpu": "none" if options.tiny else torch.cuda.get_device_name(),
        "gpus": len(set(devices)),
        "graphs": runtime.graphs,
        "torch": torch.__version__,
        "size": f"{width}x{height}",
        "steps": setting.sampling.steps,
    }
    floors = {precision: floor_ms(setting, devices[0], precision) for precision in options.precision}
    wants: dict[str, list[Tensor]] = {}
    rates: dict[str, float] = {}
    last = ()
    for name, spec in specs(options, devices):
        line = settings(spec, setting.sampling) | {"plan": name, **about, "forward_floor_ms": floors[spec.precision]}
        try:
            figures, plan, run = measure(runtime, spec, setting, options.blocks)
        except (LiveAvatarError, torch.OutOfMemoryError) as error:
            print(json.dumps(line | {"error": str(error)}), flush=True)
            continue
        want = wants.setdefault(spec.precision, run.latents)
        rate = rates.setdefault(spec.precision, figures["fps"])
        differing = [n for n, (a, b) in enumerate(zip(run.latents, want, strict=True)) if not torch.equal(a, b)]
        figures |= {
            "single_fps": rate,
            "times_single": round(figures["fps"] / rate, 3),
            "blocks_that_differ": differing,
        }
        print(json.dumps(line | figures), flush=True)
        path = options.out / f"{name.replace(' ', '_').replace('(', '').replace(')', '')}.png"
        keep(run, f"{name}, {figures['fps']} FPS", plan, path)
        last = name, spec
    if last:
        name, spec = last
        print(json.dumps({"plan": name, **kill(runtime, spec, setting, wants[spec.precision])}), flush=True)
    for card in cards():
        torch.cuda.synchronize(card)
    runtime.unload()


if __name__ == "__main__":
    sys.exit(main())
