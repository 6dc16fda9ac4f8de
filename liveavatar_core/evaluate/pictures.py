"""Figures of pictures: likeness, structure, sharpness, exposure, colour, flicker.

Every function takes a window of video frames (T, H, W, 3) in 8 bits, most a reference picture (H, W, 3) beside it.
None knows a face; who has a box around eyes, hair, a prop or the background passes that part of the frames.
tests/test_evaluate.py shows what each one notices and what it does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_CELLS, _DIRECTIONS = 8, 8  # of a descriptor
_BINS = 16  # of a colour histogram
_PATCH = 8  # side of SSIM's windows, px
_C1, _C2 = 0.01**2, 0.03**2  # SSIM's usual constants for values in 0..1


def _planes(pictures: Tensor) -> Tensor:
    """(..., H, W, 3) in 8 bits -> (N, 3, H, W) in 0..1."""
    pictures = pictures if pictures.dim() == 4 else pictures[None]
    return pictures.permute(0, 3, 1, 2).float() / 255


def luma(pictures: Tensor) -> Tensor:
    """(N, 1, H, W)"""
    planes = _planes(pictures)
    return (planes * planes.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def slopes(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and downwards, on the same (H - 1) x (W - 1) pixels."""
    return luma[..., :-1, 1:] - luma[..., :-1, :-1], luma[..., 1:, :-1] - luma[..., :-1, :-1]


def descriptor(pictures: Tensor) -> Tensor:
    """(N, D) of length 1: in each of 8 x 8 cells the colour, and how much of every direction its edges have."""
    planes = _planes(pictures)
    dx, dy = slopes(luma(pictures))
    place = (torch.atan2(dy, dx) / torch.pi + 1) * (_DIRECTIONS / 2)
    strength = torch.hypot(dx, dy)
    shares = []
    for direction in range(_DIRECTIONS):
        away = (place - direction).remainder(_DIRECTIONS)
        shares.append(strength * (1 - torch.minimum(away, _DIRECTIONS - away)).clamp(min=0))
    edges = F.adaptive_avg_pool2d(torch.cat(shares, 1), _CELLS).flatten(1)
    colours = F.adaptive_avg_pool2d(planes, _CELLS).flatten(1)
    colours = colours - colours.mean(1, keepdim=True)
    return F.normalize(torch.cat((F.normalize(edges, dim=1), F.normalize(colours, dim=1)), 1), dim=1)


def likeness(frames: Tensor, reference: Tensor) -> Tensor:
    """(T,) up to 1: cosine between the descriptors of frames and reference."""
    return descriptor(frames) @ descriptor(reference)[0]


def histogram_overlap(frames: Tensor, reference: Tensor) -> Tensor:
    """(T,) 0..1: share of the colour histogram that both have, mean over the channels."""

    def histogram(pictures: Tensor) -> Tensor:
        places = (_planes(pictures) * (_BINS - 1)).flatten(2)  # each counts in both bins it lies between
        below = places.long().clamp(max=_BINS - 2)
        counts = places.new_zeros(*places.shape[:2], _BINS)
        counts.scatter_add_(2, below, 1 + below - places).scatter_add_(2, below + 1, places - below)
        return counts / places.shape[2]

    return torch.minimum(histogram(frames), histogram(reference)).sum(2).mean(1)


def structure(frames: Tensor, reference: Tensor, where: Tensor | None = None) -> Tensor:
    """(T,) up to 1: SSIM of the luma, mean over windows that lie whole in `where` (H, W), true for what counts."""
    a, b = luma(frames), luma(reference)

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, _PATCH, stride=_PATCH // 2)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    together = mean(a * b) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + _C1) * (2 * together + _C2)
    ssim = ssim / ((mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2))
    if where is None:
        return ssim.mean((1, 2, 3))
    whole = (mean(where.float()[None, None]) > 1 - 1e-6).float()
    return (ssim * whole).sum((1, 2, 3)) / whole.sum().clamp(min=1)


def sharpness(frames: Tensor, reference: Tensor) -> Tensor:
    """(T,) about 1: strength of the strongest twentieth of all edges, over that of the reference."""

    def edges(pictures: Tensor) -> Tensor:
        strength = torch.hypot(*slopes(luma(pictures))).flatten(1)
        return strength.topk(max(1, strength.shape[1] // 20), dim=1).values.mean(1)

    return edges(frames) / edges(reference).clamp(min=1e-6)


def exposure(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) mean luma in 0..1, and (T,) share of pixels with a channel at either end."""
    ends = ((frames == 0) | (frames == 255)).any(-1).float()
    return luma(frames).mean((1, 2, 3)), ends.mean((1, 2))


def colour_shift(frames: Tensor, reference: Tensor) -> Tensor:
    """(T,) distance between the mean colours, in 8-bit steps."""
    return 255 * (_planes(frames).mean((2, 3)) - _planes(reference).mean((2, 3))).norm(dim=1)


def flicker(frames: Tensor) -> float:
    """8-bit steps by which a pixel jumps to and fro from frame to frame, in the median over all pixels.

    The second difference in time, which steady motion has none of; the median, because a face may move.
    """
    if len(frames) < 3:
        raise ValueError(f"there are {len(frames)} frames; flicker needs three")
    light = 255 * luma(frames)[:, 0]
    return (light[2:] - 2 * light[1:-1] + light[:-2]).abs().mean(0).median().item()
