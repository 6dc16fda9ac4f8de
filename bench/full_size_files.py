"""Files of random numbers with the names, shapes and number types of the published ones, for speed and memory.

    python bench/full_size_files.py FOLDER [shards single fp8_scaled lora vae umt5_fp8 umt5_fp16 wav2vec2]

Numbers are drawn on the GPU where there is one, every tensor from its own name: a layout that stores the same numbers
another way loads to the same bits. They are scaled so that activations stay of unit order; nothing else about them
means anything. The tokenizer within umT5 is a small one, trained on the demo's sentences.
"""

import argparse
import json
import os
import queue
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.published_files import header, tensors_of  # noqa: E402
from liveavatar_core.config import LIVE_AVATAR_14B  # noqa: E402
from liveavatar_core.weights.file import TensorInfo  # noqa: E402
from liveavatar_core.weights.layout import official_config  # noqa: E402

SHARDS = (9.97e9, 9.89e9, 9.96e9, 2.77e9)  # bytes of the official ones
PIECE = 64 << 20  # bytes on the way from the GPU to the file
WRITERS = 4
FP8_SCALE = 64.0  # fp8 values per unit: a normal number of unit order uses the middle of the range


def write_random(path: Path, infos: Mapping[str, TensorInfo], given: Mapping[str, Tensor] | None = None) -> None:
    """A safetensors file of these tensors, those `given` as they are. Several threads write, the GPU draws."""
    cuda = torch.cuda.is_available()
    first, starts = header(infos)
    pieces: queue.Queue[Tensor] = queue.Queue()
    for _ in range(2 * WRITERS):
        pieces.put(torch.empty(PIECE, dtype=torch.uint8, pin_memory=cuda))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, ThreadPoolExecutor(WRITERS) as writers:

        def write(piece: Tensor, count: int, place: int) -> None:
            os.pwrite(file.fileno(), memoryview(piece.numpy())[:count], place)
            pieces.put(piece)

        file.write(first)
        file.flush()
        jobs = []
        for name, info in infos.items():
            tensor = (given or {}).get(name)
            tensor = draw(name, info, "cuda" if cuda else "cpu") if tensor is None else tensor
            content = tensor.contiguous().flatten().view(torch.uint8)
            for start in range(0, info.nbytes, PIECE):
                part, piece = content[start : start + PIECE], pieces.get()
                piece[: len(part)].copy_(part)
                jobs.append(writers.submit(write, piece, len(part), starts[name] + start))
        for job in jobs:
            job.result()


def draw(name: str, info: TensorInfo, device: str) -> Tensor:
    """Random numbers that fit the tensor's part in a network, from a generator of the tensor's own."""
    if name.endswith("scale_weight"):
        return torch.tensor(1 / (FP8_SCALE * 70), device=device)  # weights of 1/sqrt(5120), about
    if name.endswith("scale_input"):
        return torch.ones((), device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(info.shape, generator=generator, device=device)
    if info.dtype == torch.float8_e4m3fn:
        noise = noise.mul_(FP8_SCALE)
    elif name.endswith(("gamma", "weight_g", "encoder.weights")) or (noise.ndim == 1 and name.endswith("weight")):
        noise = noise.mul_(0.05).add_(1)
    elif noise.ndim <= 1:
        noise = noise.mul_(0.02)
    elif name.endswith(("modulation", "cond_mask.weight", "padding_tokens")):
        noise = noise.mul_(0.3)
    elif name.endswith("SelfAttention.q.weight"):
        noise = noise.div_(sqrt(64 * noise.shape[1]))  # T5 does not scale its scores
    elif name != "shared.weight":
        noise = noise.div_(sqrt(prod(noise.shape[1:])))
    return noise.to(info.dtype)


def write_shards(folder: Path) -> None:
    """The official folder: four shards, their index and config.json."""
    infos = tensors_of("wan2.2_s2v_14B")
    groups: list[dict[str, TensorInfo]] = [{}]
    held = 0
    for name, info in infos.items():
        if held + info.nbytes > SHARDS[len(groups) - 1] and len(groups) < len(SHARDS):
            groups.append({})
            held = 0
        groups[-1][name] = info
        held += info.nbytes
    places = {}
    for number, group in enumerate(groups, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(groups):05}.safetensors"
        write_random(folder / file, group)
        places |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(info.nbytes for info in infos.values())}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(official_config(LIVE_AVATAR_14B)))


def write_umt5(path: Path) -> None:
    from liveavatar_core.demo.random_model import train_tokenizer

    tokenizer = train_tokenizer()
    infos = tensors_of(path.stem)
    infos["spiece_model"] = TensorInfo(tuple(tokenizer.shape), torch.uint8)
    write_random(path, infos, {"spiece_model": tokenizer})


def _single(path: Path) -> None:
    write_random(path, tensors_of("wan2.2_s2v_14B"))


def _listed(path: Path) -> None:
    write_random(path, tensors_of(path.stem))


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {  # where ComfyUI has them, and who writes them
    "shards": ("diffusion_models/Wan2.2-S2V-14B", write_shards),
    "single": ("diffusion_models/wan2.2_s2v_14B_bf16.safetensors", _single),
    "fp8_scaled": ("diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors", _listed),
    "lora": ("loras/liveavatar.safetensors", _listed),
    "vae": ("vae/wan_2.1_vae.safetensors", _listed),
    "umt5_fp8": ("text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", write_umt5),
    "umt5_fp16": ("text_encoders/umt5_xxl_fp16.safetensors", write_umt5),
    "wav2vec2": ("audio_encoders/wav2vec2_large_english_fp16.safetensors", _listed),
}


def write_file(models: Path, kind: str) -> Path:
    """Write one of FILES below a folder of ComfyUI models, and say how fast that went."""
    place, write = FILES[kind]
    path = models / place
    started = time.perf_counter()
    write(path)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    print(f"{path} {size / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(FILES)}; all if none is given")
    options = parser.parse_args()
    for kind in options.kinds or FILES:
        write_file(options.models, kind)
