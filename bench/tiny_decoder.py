"""Speed and memory of the stream decoders that Online VAE Decode can use, at full size with random weights.

    python bench/tiny_decoder.py [--size 704x384] [--blocks 24] [--device cuda:0]

One line each: milliseconds of a block (3 latents in, 12 frames as uint8 on the host out) and memory beyond the weights.
Pictures are noise: nothing here says how a decoder looks.
"""

import argparse
import statistics
import sys
import time
from math import prod
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from liveavatar_core.encoders.tiny_decoder import TinyStreamDecoder, load_tiny  # noqa: E402
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE  # noqa: E402
from liveavatar_core.geometry import LATENTS_PER_BLOCK, PRIME_LATENTS, Geometry  # noqa: E402

MIB = 2**20
KEYS = ROOT / "tests" / "data" / "taew2_1_keys.txt"


def tiny_stream(dtype: torch.dtype, device: torch.device) -> TinyStreamDecoder:
    """Matrices keep the size of what they are applied to, so that no activation overflows or dies out."""
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for line in KEYS.read_text().splitlines():
        if not line.startswith("#"):
            name, shape = line.split()[0], tuple(map(int, line.split()[1].split("x")))
            spread = 1.4 / prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.1
            state[name] = torch.randn(shape, generator=generator, device=device) * spread
    return TinyStreamDecoder(load_tiny(state, normalised=True, dtype=dtype, device=device))


def full_stream(width: int, dtype: torch.dtype, device: torch.device) -> StreamDecoder:
    torch.manual_seed(0)
    with torch.device(device):
        return StreamDecoder(WanVAE(AutoencoderKLWan(base_dim=width).to(dtype)))


def measure(decoder: TinyStreamDecoder | StreamDecoder, geometry: Geometry, blocks: int, device: torch.device) -> str:
    size = (geometry.latent_height, geometry.latent_width)
    latents = torch.randn(16, PRIME_LATENTS, *size, device=device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    decoder.prime(latents)
    times = []
    for _ in range(blocks):
        start = time.perf_counter()
        decoder.decode(latents[:, :LATENTS_PER_BLOCK]).cpu()
        times.append(1000 * (time.perf_counter() - start))
    words = f"{statistics.median(times[blocks // 3 :]):8.2f} ms a block"
    if cuda:
        peak, stays = torch.cuda.max_memory_allocated() - held, torch.cuda.memory_allocated() - held
        words += f", peak {peak / MIB:.0f} MiB, {stays / MIB:.0f} MiB of it between blocks"
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="704x384")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    geometry, device = Geometry(height, width), torch.device(options.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), "torch", torch.__version__)
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name, make in (
        ("taew2_1, lighttaew2_1, float16", lambda: tiny_stream(torch.float16, device)),
        ("the same, bfloat16", lambda: tiny_stream(torch.bfloat16, device)),
        ("lightvaew2_1", lambda: full_stream(24, half, device)),
        ("Wan2.1_VAE", lambda: full_stream(96, half, device)),
    ):
        decoder = make()
        print(f"{name:32}{measure(decoder, geometry, options.blocks, device)}", flush=True)
        del decoder


with torch.inference_mode():
    main()
