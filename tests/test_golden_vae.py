"""The VAE against recorded encodes, a whole decode and a streamed one."""

import pytest
import torch

from liveavatar_core.encoders.vae import StreamDecoder, load_vae
from liveavatar_core.geometry import PRIME_LATENTS

ENCODE, DECODE = 5e-6, 2e-5  # float32 kernels differ by 4e-7 and 1.2e-6; a wrong cache by 1e-2 and more


@pytest.fixture(scope="module")
def recorded(golden):
    return golden("vae")


@pytest.fixture(scope="module")
def vae(golden):
    weights, _ = golden("vae_weights")
    return load_vae(weights, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def whole(vae, recorded):
    return vae.decode(recorded[0]["z"], clamp=False)


def test_constants(vae, recorded, agree):
    tensors, _ = recorded
    agree("vae", "latent_mean", vae.latent_mean.flatten(), tensors["latent_mean"], 0)
    agree("vae", "latent_std", vae.latent_std.flatten(), tensors["latent_std"], 0)


def test_encode(vae, recorded, agree):
    tensors, _ = recorded
    names = [name for name in tensors if name.startswith("encode_")]
    assert names
    for name in names:
        frames = tensors["pixels"][:, : int(name.removeprefix("encode_"))]
        agree("vae", name, vae.encode(frames), tensors[name], ENCODE)


def test_whole_decode(whole, recorded, agree):
    agree("vae", "decode_full_unclamped", whole, recorded[0]["decode_full_unclamped"], DECODE)


def test_streamed_decode(vae, whole, recorded, agree):
    """(mean, rms, sum of every 101st element) of every call of the original's stream decoder.

    The sum runs over elements of both signs, so its error is judged against the sum of their sizes.
    """
    tensors, manifest = recorded
    counts = manifest["stream_frames"]
    calls = (tensors["z"].shape[1] - PRIME_LATENTS) // (len(counts) - 1)
    pieces = tensors["z"].split([PRIME_LATENTS] + [calls] * (len(counts) - 1), 1)
    streamed, stream = [], StreamDecoder(vae)
    for piece, count in zip(pieces, counts, strict=True):
        frames = stream.decode(piece)
        assert len(frames) == count
        streamed.append(frames)
    assert (torch.cat(streamed).int() - as_bytes(whole).int()).abs().max() <= 1

    for i, part in enumerate(whole.clamp(-1, 1).split(counts, 1)):
        sampled = part.flatten()[::101].double()
        got = torch.stack([part.double().mean(), part.double().square().mean().sqrt(), sampled.sum()])
        scale = torch.stack([got[1], got[1], sampled.abs().sum()])
        agree("vae", f"stream_{i}_stats", got / scale, tensors[f"stream_{i}_stats"] / scale, DECODE)


def as_bytes(frames):
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
