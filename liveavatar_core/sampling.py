"""Noise and Euler step: everything between two forwards but the levels. Memoryless, so steps may run in any process."""

import hashlib

import torch
from torch import Tensor

from liveavatar_core.config import DISTANCE_RANGE, SamplingConfig
from liveavatar_core.geometry import BLOCKS_PER_CLIP, LATENTS_PER_BLOCK


def timestep(sigma: float) -> float:
    """1000 * sigma in float32, unrounded: what the time embedding takes."""
    return (torch.tensor(sigma) * 1000).item()


def euler(latent: Tensor, velocity: Tensor, step: int, levels: tuple[float, ...]) -> Tensor:
    """One step towards the picture, in the scheduler's own arithmetic.

    The increment is rounded to the latent's dtype before a float32 addition. Written with a 0-dim tensor on the left
    because bf16 products round differently otherwise, on CPUs at least.
    """
    increment = torch.tensor(levels[step + 1]) - torch.tensor(levels[step])
    return (latent.float() + increment * velocity).to(latent.dtype)


def _draw(*key: int) -> int:
    """64 well-mixed bits that depend on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def block_noise(seed: int, block: int, shape: tuple[int, ...]) -> Tensor:
    """Gaussian noise of one block, a function of (seed, block): the same on any device, in any order."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_draw(seed, block)))


def clip_noise(seed: int, block: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The original's noise: one draw for the four blocks of a clip from seed + clip, on the device, in its dtype."""
    clip, place = divmod(block, BLOCKS_PER_CLIP)
    generator = torch.Generator(device).manual_seed(seed + clip)
    channels, latents, *size = shape
    whole = torch.randn((channels, BLOCKS_PER_CLIP * latents, *size), generator=generator, device=device, dtype=dtype)
    return whole[:, place * LATENTS_PER_BLOCK : (place + 1) * LATENTS_PER_BLOCK]


def reference_distance(sampling: SamplingConfig, block: int, step: int) -> int:
    """How far ahead of a block the reference sits, in latents; drawn from (seed, block, step) unless given."""
    if isinstance(sampling.distance, tuple):
        return sampling.distance[block][step]
    if sampling.distance is not None:
        return sampling.distance
    low, high = DISTANCE_RANGE
    return low + _draw(sampling.seed, block, step) % (high - low + 1)
