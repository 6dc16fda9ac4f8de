"""Speed and memory of the DiT (and of the VAE's stream decoder) on one GPU, at full size with random weights.

    python bench/single_gpu.py [--precision bf16 fp8] [--size 704x384] [--forwards 12] [--vae] [--commit NAME]

Prints one table per precision and, last, one JSON line each. Pictures are noise: only speed, memory and the distance
between precisions mean anything. `--size tiny` runs a toy model anywhere, to test this file.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from liveavatar_core.config import LIVE_AVATAR_14B, ModelConfig, SamplingConfig  # noqa: E402
from liveavatar_core.geometry import PRIME_LATENTS, WINDOW_BLOCKS, Geometry  # noqa: E402
from liveavatar_core.model.dit import CausalDiT  # noqa: E402
from liveavatar_core.pipeline.plan import PREFILL, single  # noqa: E402
from liveavatar_core.pipeline.stage import Stage  # noqa: E402
from liveavatar_core.types import BlockRequest, Payload  # noqa: E402
from liveavatar_core.weights.build import empty_dit  # noqa: E402
from liveavatar_core.weights.quant import Fp8Linear, quantise_linears  # noqa: E402

TINY = ModelConfig(dim=256, heads=2, ffn_dim=512, layers=3, audio_layers=(0, 2), audio_dim=16, audio_states=3)
RINGS = {"bf16": 2, "fp8": 4}  # steps whose caches are held: four rings beside bf16 weights would not fit into 80 GB
SHOWN = (
    "forward_ms",
    "vae_ms",
    "forward_ms_range",
    "first_quarter_ms",
    "last_quarter_ms",
    "host_ms",
    "kernels_ms",
    "gpu_idle",
    "start_ms",
    "first_block_ms",
    "peak_gib",
    "growth_mib",
    "velocity_error",
)
KINDS = (  # kind, parts of kernel names; the first match counts
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "wgmma")),
    ("conv", ("conv", "implicit")),
    ("copy", ("memcpy", "memset", "copy_kernel", "catarray", "nchwtonhwc", "nhwctonchw")),
    ("fused pointwise", ("_norm", "_gated", "_heads", "_quantise")),
)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "elementwise, norms")


def random_model(config: ModelConfig, precision: str, device: torch.device) -> CausalDiT:
    """Every weight from its own seed, so that two precisions quantise the same numbers."""
    model = empty_dit(config)
    names = dict(model.named_parameters())
    if precision == "fp8":
        quantise_linears(model)
    for index, (name, like) in enumerate(names.items()):
        generator = torch.Generator(device).manual_seed(index)
        keeps32 = name.startswith(("time_", "head.", "casual_audio_encoder."))
        value = torch.randn(like.shape, generator=generator, device=device)
        if name.endswith("modulation"):
            value = value / like.shape[-1] ** 0.5
        elif like.dim() > 1:
            value = value / like[0].numel() ** 0.5
        else:
            value = 1 + 0.02 * value if "norm" in name and name.endswith("weight") else 0.02 * value
        value = value.to(torch.float32 if keeps32 or "modulation" in name else torch.bfloat16)
        module, _, part = name.rpartition(".")
        owner = model.get_submodule(module)
        if isinstance(owner, Fp8Linear) and part == "weight":
            owner.store(value)
        else:
            setattr(owner, part, nn.Parameter(value, requires_grad=False))
    return model.eval()


class Loop:
    """A stage that owns every layer, fed block after block with random sound."""

    def __init__(self, model: CausalDiT, geometry: Geometry, rings: int, device: torch.device) -> None:
        config = model.config
        self.model, self.geometry, self.config, self.device = model, geometry, config, device
        spec = replace(single(4, config.layers, [str(device)]).stages[0], steps=range(rings))
        sampling = SamplingConfig(seed=1, reanchor_block=None)
        self.stage = Stage(spec, model, geometry, sampling, self.random(100, 77, config.text_dim))
        size = (geometry.latent_height, geometry.latent_width)
        condition = (self.random(101, config.channels, 1, *size), self.random(102, config.channels, 19, *size))
        self.stage.run(Payload(block=PREFILL, step=PREFILL, sink=0, condition=condition))

    def random(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)

    def payload(self, block: int) -> Payload:
        features = self.random(1000 + block, 1, self.config.audio_states, self.config.audio_dim, 12)
        return Payload(block=block, step=0, sink=0, request=BlockRequest(block, features))

    def forwards(self, first: int, last: int) -> Iterator[tuple[Payload, Payload]]:
        """(before, after) of every forward of blocks first..last-1; nothing waits for the GPU."""
        for block in range(first, last):
            payload = self.payload(block)
            for _ in self.stage.spec.steps:
                done = self.stage.run(payload)
                yield payload, done
                payload = done


def measure(loop: Loop, forwards: int) -> dict:
    """Milliseconds of one forward in the steady state; call with full rings."""
    rings = len(loop.stage.spec.steps)
    block = loop.stage._caches[0][0].next_block
    last = block + -(-forwards // rings)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated: list[int] = []  # bytes after each forward
    marks, host = [torch.cuda.Event(enable_timing=True)], []
    marks[0].record()
    start = time.perf_counter()
    for _ in loop.forwards(block, last):
        host.append(time.perf_counter() - start)
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        allocated.append(torch.cuda.memory_allocated())
        start = time.perf_counter()
    torch.cuda.synchronize()
    periods = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)][1:]
    # Every slot's graph has been captured by then; what comes after is the steady state.
    periods = periods[WINDOW_BLOCKS * rings :] or periods
    quarter = max(1, len(periods) // 4)
    kernels, slowest, idle = profile(lambda: deque(loop.forwards(last, last + 1), 0), rings)
    return {
        "forward_ms": round(statistics.median(periods), 2),
        "forward_ms_range": [round(min(periods), 2), round(max(periods), 2)],
        "first_quarter_ms": round(statistics.median(periods[:quarter]), 2),
        "last_quarter_ms": round(statistics.median(periods[-quarter:]), 2),
        "growth_mib": (allocated[-1] - allocated[len(allocated) // 2]) >> 20,
        "host_ms": round(1000 * statistics.median(host), 2),
        "kernels_ms": round(sum(kernels.values()), 2),
        "gpu_idle": round(idle, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "breakdown_ms": kernels,
        "slowest": slowest,
    }


def profile(work: Callable[[], None], parts: int) -> tuple[dict[str, float], list[tuple[str, int, float]], float]:
    """Kernel milliseconds of one of the `parts` equal pieces of work by kind, the slowest kernels as (name, calls,
    ms), and the idle share of the GPU: what no kernel covers between the first and the last."""
    from torch.profiler import ProfilerActivity

    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    spans = []
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            ms = event.time_range.elapsed_us() / 1000 / parts
            kinds[kind_of(event.name)] += ms
            names[event.name].append(ms)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    idle = 1 - 1000 * parts * sum(kinds.values()) / whole
    kinds = {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])}
    slowest = sorted(names.items(), key=lambda item: -sum(item[1]))[:20]
    return kinds, [(name[:90], round(len(ms) / parts), round(sum(ms), 2)) for name, ms in slowest], idle


def velocities(loop: Loop, blocks: int, feed: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """(latents, velocities) of every forward from block 0; with `feed`, each forward starts from a given latent."""
    latents, seen = [], []
    handle = loop.model.head.register_forward_hook(lambda module, args, output: seen.append(output.float().cpu()))
    for block in range(blocks):
        payload = loop.stage._admit(loop.payload(block))
        for _ in loop.stage.spec.steps:
            if feed is not None:
                payload = replace(payload, latent=feed[len(latents)].to(loop.device))
            latents.append(payload.latent.cpu())
            payload = loop.stage.run(payload)
    handle.remove()
    return latents, seen


def measure_vae(geometry: Geometry, device: torch.device, *, channels_last: bool) -> dict:
    from diffusers import AutoencoderKLWan

    from liveavatar_core.encoders.vae import StreamDecoder, WanVAE

    torch.manual_seed(0)
    with torch.device(device):
        vae = WanVAE(AutoencoderKLWan()).to(dtype=torch.bfloat16)
    if channels_last:
        for module in vae.model.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
    decoder = StreamDecoder(vae)
    torch.cuda.reset_peak_memory_stats()
    latents = torch.randn(16, PRIME_LATENTS, geometry.latent_height, geometry.latent_width, device=device)
    decoder.prime(latents)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        decoder.decode(latents[:, :3]).cpu()
        times.append(1000 * (time.perf_counter() - start))
    kernels, slowest, idle = profile(lambda: decoder.decode(latents[:, :3]).cpu(), 1)
    return {
        "precision": "VAE, channels last" if channels_last else "VAE",
        "vae_ms": round(statistics.median(times[2:]), 1),
        "kernels_ms": round(sum(kernels.values()), 2),
        "gpu_idle": round(idle, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "breakdown_ms": kernels,
        "slowest": slowest,
    }


def measure_start(model: CausalDiT, geometry: Geometry, rings: int, device: torch.device) -> dict:
    """A new stream on a warm model: until the attention sink is there, and from then until block 0 is."""
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    loop = Loop(model, geometry, rings, device)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    deque(loop.forwards(0, 1), 0)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    return {
        "start_ms": round(1000 * (times[1] - times[0]), 1),
        "first_block_ms": round(1000 * (times[2] - times[1]), 1),
    }


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(result: dict) -> None:
    print(f"\n== {result['precision']} {result['size']} on {result['gpu']}")
    for name in SHOWN:
        if name in result:
            print(f"{name:18} {result[name]}")
    for kind, ms in result["breakdown_ms"].items():
        print(f"  {kind:20} {ms:8.2f} ms")
    for name, calls, ms in result["slowest"]:
        print(f"    {ms:8.2f} ms {calls:5} x {name}")


@torch.inference_mode()
def main(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.size == "tiny"
    width, height = (64, 64) if tiny else map(int, options.size.split("x"))
    geometry, config = Geometry(height, width), TINY if tiny else LIVE_AVATAR_14B
    about = {
        "command": "python bench/single_gpu.py " + " ".join(sys.argv[1:]),
        "commit": options.commit or commit(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "size": options.size,
        "weights": "random",
    }
    lines, reference = [], None
    for precision in options.precision:
        model = random_model(config, precision, device)
        loop = Loop(model, geometry, RINGS[precision], device)
        feed = None if reference is None else reference[0]
        compared = replace(loop.stage.spec, steps=range(min(RINGS.values())))
        whole, loop.stage.spec = loop.stage.spec, compared
        latents, seen = velocities(loop, WINDOW_BLOCKS + 1, feed)
        result = {**about, "precision": precision}
        if reference is None:
            reference = (latents, seen)
        else:
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(seen, reference[1], strict=True)]
            result["velocity_error"] = {"mean": statistics.mean(errors), "largest": max(errors)}
            loop.stage.spec = whole
            for step in whole.steps[len(compared.steps) :]:
                for cache in loop.stage._caches[step]:
                    cache.next_block = WINDOW_BLOCKS + 1  # as full as the others; what is in it costs the same time
        if device.type == "cuda":
            result |= measure(loop, options.forwards)
            rings = len(loop.stage.spec.steps)
            del loop
            gc.collect()
            torch.cuda.empty_cache()
            result |= measure_start(model, geometry, rings, device)
            show(result)
        lines.append(result)
        del model
        loop = None
        gc.collect()
        torch.cuda.empty_cache()
    if options.vae and device.type == "cuda":
        for channels_last in (False, True):
            lines.append({**about, **measure_vae(geometry, device, channels_last=channels_last)})
            show(lines[-1])
    for line in lines:
        print(json.dumps({name: value for name, value in line.items() if name != "slowest"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=sorted(RINGS), default=["bf16", "fp8"])
    parser.add_argument("--size", default="704x384")
    parser.add_argument("--forwards", type=int, default=32)
    parser.add_argument("--vae", action="store_true")
    parser.add_argument("--commit", default="")
    main(parser.parse_args())
