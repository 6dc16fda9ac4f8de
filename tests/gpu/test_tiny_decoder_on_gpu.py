"""The tiny decoder on a GPU, published widths and random weights: close to the CPU's frames, no memory gained."""

from math import prod
from pathlib import Path

import pytest
import torch

from liveavatar_core.encoders.tiny_decoder import TinyStreamDecoder, load_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KEYS = Path(__file__).parent.parent / "data" / "taew2_1_keys.txt"


@pytest.fixture(autouse=True)
def _exact():
    with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for line in KEYS.read_text().splitlines():
        if not line.startswith("#"):
            name, shape = line.split()[0], tuple(map(int, line.split()[1].split("x")))
            spread = 1.4 / prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.1
            weights[name] = torch.randn(shape, generator=generator) * spread
    return weights


def test_frames_are_those_of_the_cpu(state):
    latents = torch.randn(16, 7, 8, 12, generator=torch.Generator().manual_seed(1))

    def frames(dtype: torch.dtype, device: str) -> torch.Tensor:
        vae, past = load_tiny(state, normalised=True, dtype=dtype, device=device), {}
        return torch.cat([vae.decode(part, past).float().cpu() for part in latents.split([1, 3, 3], 1)])

    want = frames(torch.float32, "cpu")
    # Some thirty layers that round, to 24 bits and to 11; in float32 the kernels also sum in ways of their own.
    for dtype, bound in ((torch.float32, 2e-5), (torch.float16, 30**0.5 * 2**-11)):
        assert (frames(dtype, "cuda") - want).norm() < bound * want.norm(), dtype


def test_memory_stays_the_same(state):
    stream = TinyStreamDecoder(load_tiny(state, normalised=True, dtype=torch.float16, device="cuda"))
    held = set()
    for block in range(20):
        stream.decode(torch.randn(16, 3, 16, 16, device="cuda"))
        if block:
            held.add(torch.cuda.memory_allocated())
    assert len(held) == 1
