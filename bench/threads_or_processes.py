"""Host time of a stage when the others are threads of its process, which share one GIL, and when each has its own.

    python bench/threads_or_processes.py            about 90 s on two GPUs
    python bench/threads_or_processes.py --tiny     a toy model on the CPU, without graphs, to try the script

The stages of a layer ring, the full-size model's with random weights in fp8, on all GPUs in turn. Each runs its hops
back to back on a stream of its own, on inputs it is given, and waits for its GPU after each: no queue of launches fills
up, and nothing waits for another stage. So this is launching alone, without links, embedding, decoder or order of hops.
`alone` is one of the same stages with nobody beside it.

Stages that outnumber the GPUs are so many only to the host: they share a GPU's time, each hop would take several times
what it takes on a GPU of its own, and the host would launch less often than it will have to. Pictures are then 352x192,
a quarter of the tokens, which brings the pace near that of a GPU for each; every line has its `size` and `gpus`.

Prints one JSON line per variant, in milliseconds: `host` is inside Stage.run, the median and the 90th percentile of all
stages' hops; `block_host` of one block's hops in one stage; `gpu` from a hop's beginning to its end on the GPU, pauses
in which that waits for launches included; `pace` from hop to hop, the wait for the GPU included.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from liveavatar_core.bench.stand_ins import RandomWeights
from liveavatar_core.config import LIVE_AVATAR_14B, SamplingConfig
from liveavatar_core.demo.random_model import DEMO_CONFIG
from liveavatar_core.geometry import LATENTS_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.model.audio import AudioTokens
from liveavatar_core.pipeline.links import Lane
from liveavatar_core.pipeline.plan import PREFILL, StageSpec, layer_ring
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.schedule import levels
from liveavatar_core.types import Payload
from liveavatar_core.weights.build import load_dit, work_dtype

SETTLED = 2 * WINDOW_BLOCKS + 1  # blocks until the window is full and every slot of it has its graph
BLOCKS = 6  # that are measured
PATIENCE = 300  # seconds until a stage that has not come to the start is given up
STEPS = 4
FULL, QUARTER, TOY = Geometry(384, 704), Geometry(192, 352), Geometry(64, 64)

Hop = tuple[float, float, float]  # seconds: host, GPU, from hop to hop

start = None  # the barrier at which all stages of a variant meet


def meet_at(barrier) -> None:
    global start
    start = barrier


def inputs(stage: Stage) -> tuple[Payload, Payload]:
    """A prefill and a hop as the stage before would send them, but of random numbers."""
    config, geometry = stage.model.config, stage.geometry
    kind = {"device": stage.device, "dtype": stage.model.dtype}
    sink = torch.randn(1, geometry.sink_tokens, config.dim, **kind)
    size = geometry.latent_height, geometry.latent_width
    latent = torch.randn(config.channels, LATENTS_PER_BLOCK, *size, **kind)
    hidden = torch.randn(1, geometry.tokens_per_block, config.dim, **kind)
    heard = torch.randn(1, LATENTS_PER_BLOCK, config.audio_tokens + 2, config.dim, **kind)
    audio = AudioTokens(heard[:, :, 1:], heard[:, :, :1])
    return Payload(0, PREFILL, 0, hidden=sink), Payload(0, 0, 0, latent, hidden, audio)


def hops(stage: Stage, lane: Lane) -> list[Hop]:
    """Of the blocks that are measured, once all stages are ready."""
    prefill, hop = inputs(stage)
    stage.run(prefill)
    taken = []
    for block in range(SETTLED + BLOCKS):
        if block == SETTLED:
            lane.drain()
            start.wait(PATIENCE)
        for step in range(STEPS):
            begin, launched = lane.mark(), time.perf_counter()
            stage.run(replace(hop, block=block, step=step))
            host, end = time.perf_counter() - launched, lane.mark()
            lane.drain()
            taken.append((host, end.time - begin.time, time.perf_counter() - launched))
    start.wait(PATIENCE)  # nobody prepares what comes next while others are measured
    return taken[STEPS * SETTLED :]


@torch.inference_mode()
def work(spec: StageSpec, geometry: Geometry, tiny: bool) -> dict[str, list[Hop]]:
    """One stage beside the others, without and with graphs."""
    config, precision = (DEMO_CONFIG, "fp32") if tiny else (LIVE_AVATAR_14B, "fp8")
    device = torch.device(spec.device)
    lane = Lane(device, tuple(torch.cuda.Stream(device) for _ in range(3)) if device.type == "cuda" else ())
    try:
        with lane.active():
            model = load_dit(
                RandomWeights(config, device),
                config,
                layers=spec.layers,
                dtype=work_dtype(precision, spec.device),
                device=device,
                fp8=precision == "fp8",
            )
            sampling, text = SamplingConfig(), torch.randn(77, config.text_dim)
            found = {}
            for mode in ("eager",) if tiny else ("eager", "graphs"):
                found[mode] = hops(
                    Stage(spec, model, geometry, sampling, levels(sampling), text, graphs=mode == "graphs"), lane
                )
            return found
    except BaseException:
        start.abort()  # the others need not wait
        raise


def figures(stages: list[list[Hop]]) -> dict:
    host, gpu, pace = zip(*(hop for taken in stages for hop in taken), strict=True)
    blocks = [sum(hop[0] for hop in taken[i : i + STEPS]) for taken in stages for i in range(0, len(taken), STEPS)]
    median = {"host_ms": host, "block_host_ms": blocks, "gpu_ms": gpu, "pace_ms": pace}
    found = {name: round(1000 * statistics.median(seconds), 3) for name, seconds in median.items()}
    return found | {"host_p90_ms": round(1000 * statistics.quantiles(host, n=10)[-1], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", help="2 and 8; 2 and 4 of the toy")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    options = parser.parse_args()
    gpus = 0 if options.tiny else torch.cuda.device_count()
    about = {"gpu": torch.cuda.get_device_name() if gpus else "none", "gpus": gpus, "cores": os.cpu_count()}
    layers = (DEMO_CONFIG if options.tiny else LIVE_AVATAR_14B).layers
    spawn = multiprocessing.get_context("spawn")
    for count in options.stages or ((2, 4) if options.tiny else (2, 8)):
        specs = layer_ring(STEPS, layers, [f"cuda:{i % gpus}" if gpus else "cpu" for i in range(count)]).stages
        geometry = TOY if options.tiny else FULL if gpus >= count else QUARTER
        variants = {
            "alone": (1, threading, ThreadPoolExecutor),
            "threads": (count, threading, ThreadPoolExecutor),
            "processes": (count, spawn, partial(ProcessPoolExecutor, mp_context=spawn)),
        }
        for name, (beside, kind, pool) in variants.items():
            began = time.perf_counter()
            with pool(beside, initializer=meet_at, initargs=(kind.Barrier(beside),)) as workers:
                found = list(workers.map(partial(work, geometry=geometry, tiny=options.tiny), specs[:beside]))
            line = {"stages": count, "as": name, "size": f"{geometry.width}x{geometry.height}"}
            seconds = round(time.perf_counter() - began, 1)
            for mode in found[0]:
                of_mode = figures([each[mode] for each in found])
                print(json.dumps(line | {"launches": mode} | of_mode | {"took_s": seconds} | about), flush=True)


if __name__ == "__main__":
    main()
