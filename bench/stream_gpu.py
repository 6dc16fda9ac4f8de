"""One GPU, end to end at full size: sound features in, frames on the host out, as a run in ComfyUI does it.

    python bench/stream_gpu.py [--precision fp8] [--size 704x384] [--blocks 20]

Random weights and inputs: speed and memory mean something, pictures do not. The speech encoder is left out. Prints
one JSON line: time to the first frames, frames a second once the window is full, and peak memory.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import AutoencoderKLWan
from single_gpu import commit, random_model

from liveavatar_core.config import LIVE_AVATAR_14B, ModelConfig, SamplingConfig
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE
from liveavatar_core.geometry import FRAMES_DROPPED, FRAMES_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.pipeline.plan import single
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise, frame_chunks
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.types import BlockRequest, Conditioning


def measure(
    config: ModelConfig, vae: WanVAE, geometry: Geometry, precision: str, blocks: int, device: torch.device
) -> dict:
    model = random_model(config, precision, device)
    sampling = SamplingConfig(seed=1)
    plan = single(sampling.steps, config.layers, [str(device)])
    picture = torch.rand(3, geometry.height, geometry.width) * 2 - 1
    sound = torch.randn(1, config.audio_states, config.audio_dim, FRAMES_PER_BLOCK)
    with torch.inference_mode():
        started = time.perf_counter()
        portrait = portrait_latents(vae, picture)
        encoded = time.perf_counter()
        conditioning = Conditioning(torch.randn(77, config.text_dim), *portrait)
        stages = [Stage(spec, model, geometry, sampling, conditioning.text) for spec in plan.stages]
        frames = blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED
        times = []
        with ThreadedPipeline(plan, stages) as pipeline:
            begun = time.perf_counter()
            latents = denoise(
                pipeline, conditioning, sampling, lambda block: BlockRequest(block, sound), blocks, depth=2
            )
            for chunk in frame_chunks(latents, StreamDecoder(vae), portrait[1], frames):
                chunk.frames.cpu()
                times.append(time.perf_counter())
    steady = [b - a for a, b in zip(times, times[1:], strict=False)][2 * WINDOW_BLOCKS :]
    return {
        "precision": precision,
        "size": f"{geometry.width}x{geometry.height}",
        "blocks": blocks,
        "portrait_s": round(encoded - started, 2),
        "first_frames_s": round(times[0] - begun, 2),
        "block_ms": round(1000 * statistics.median(steady), 1),
        "frames_per_second": round(FRAMES_PER_BLOCK / statistics.median(steady), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp8", choices=["bf16", "fp8"])
    parser.add_argument("--size", default="704x384")
    parser.add_argument("--blocks", type=int, default=20)
    options = parser.parse_args()
    width, height = (int(side) for side in options.size.split("x"))
    device = torch.device("cuda:0")
    torch.manual_seed(0)
    with torch.device(device):
        vae = WanVAE(AutoencoderKLWan()).to(dtype=torch.bfloat16)
    result = measure(LIVE_AVATAR_14B, vae, Geometry(height, width), options.precision, options.blocks, device)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    print(json.dumps(result | about))


if __name__ == "__main__":
    main()
