"""The walk through diffusers' decoder against its own forward; shortcuts against the long way."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from liveavatar_core.encoders.decoder import decode
from liveavatar_core.encoders.maps import Sum, _quarters, causal, double

# In float64 everywhere; but diffusers rounds to float32 where it upsamples.
ROUNDED = 3e-6
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = AutoencoderKLWan(base_dim=4).decoder.double().eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


@pytest.fixture(scope="module")
def latents():
    return torch.randn(8, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs(decoder, latents):
    """One latent at a time, frames (29, 24, 16, 3)."""
    caches = [None] * 64
    with torch.inference_mode():
        parts = [decoder(z[None, :, None], feat_cache=caches, feat_idx=[0]) for z in latents.permute(0, 3, 1, 2)]
    return torch.cat(parts, 2)[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("split", [[1, 7], [1] * 8, [1, 3, 3, 1], [1, 1, 2, 1, 3]], ids=str)
def test_the_walk_is_the_decoder(decoder, latents, theirs, split):
    past = {}
    ours = torch.cat([decode(decoder, part.clone(), past) for part in latents.split(split)])
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDED)
    assert all(len(frames) == 2 and frames.is_contiguous() for frames in past.values())


def test_every_causal_convolution_has_its_own_past(decoder, latents):
    past = {}
    for part in latents.split([1, 3, 4]):
        decode(decoder, part.clone(), past)
    assert len(past) == sum(isinstance(part, nn.Conv3d) and part.kernel_size[0] == 3 for part in decoder.modules())


def test_doubling_from_quarters():
    """Four small kernels on the maps as they are, against one on the maps doubled."""
    x, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    want = double(Sum(x.clone()), weight)
    seen = set()
    for (down, right), quarter in _quarters(weight):
        padded = F.pad(x.permute(0, 3, 1, 2), (1 - right, right, 1 - down, down))
        got = F.conv2d(padded, quarter.squeeze(1).permute(0, 3, 1, 2).to(x.dtype)).permute(0, 2, 3, 1)
        torch.testing.assert_close(got, want[:, down::2, right::2], rtol=0, atol=1e-5)  # taps are added in float32
        seen.add((down, right))
    assert len(seen) == 4


def test_a_sum_is_added_up_once(decoder):
    """What a convolution sees and what it hands on are the same sum."""
    x, skip = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64)
    bias, past = torch.randn(8, dtype=torch.float64), torch.zeros(2, 3, 4, 8, dtype=torch.float64)
    weight = torch.zeros(8, 8, 3, 1, 1, dtype=torch.float64)
    weight[:, :, 2, 0, 0] = torch.eye(8)  # the newest frame, as it is
    want = x + bias + skip
    maps = Sum(x, bias, skip)
    total, y = causal(maps, past, weight, keep=True)
    for got in (total, y, past):
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
    assert maps == Sum(None), "what has been used up must not be kept alive"
