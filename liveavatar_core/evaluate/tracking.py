"""Where parts of the reference picture are in every frame, and what has become of their shape.

Parts are found by their edges, so that light hardly matters, at a size of about 192 pixels.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.evaluate.pictures import luma, slopes

Box = tuple[float, float, float, float]  # left, top, right, bottom in px

_FINE = 192  # px of the shorter side at which is searched
_REACH = 0.12  # of the shorter side, by which a part may be away
_BESIDE, _ABOVE = 0.25, 1.3  # of a mouth's width and height: where what surrounds it is looked at, up to the eyes
_CLEARLY = 0.05  # by which a place must fit better than rest
_CELLS = 4  # to a side, into which a part is cut to see its shape
_EVERY = 5  # frames, of which one is looked at for that


def track_mouth(frames: Tensor, reference: Tensor, box: Box) -> Tensor:
    """(T, 4): the mouth's box in every frame. What is around it is looked for, for lips move."""
    left, top, right, bottom = box
    beside, above = _BESIDE * (right - left), _ABOVE * (bottom - top)
    around = inside(reference, (left - beside, top - above, right + beside, bottom))
    shifts, *_ = _search(_Edges.of(frames, reference), around & ~inside(reference, box))
    return torch.tensor(box) + shifts.repeat(1, 2)


def follow(frames: Tensor, reference: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """A part, cut out of every frame where it is (T, h, w, 3), and how far (T, 2) it has moved to the right and
    downwards, in px: 0 where it is not clearly elsewhere."""
    height, width = reference.shape[:2]
    part = inside(reference, box)
    shifts, best, at_rest = _search(_Edges.of(frames, reference), part)
    shifts = torch.where((best > at_rest + _CLEARLY)[:, None], shifts, 0)
    used = part.nonzero()
    (top, left), (bottom, right) = used.amin(0).tolist(), (used.amax(0) + 1).tolist()
    across, down = shifts.round().long().unbind(1)
    rows = (torch.arange(top, bottom) + down[:, None]).clamp(0, height - 1)  # what is outside repeats the edge
    columns = (torch.arange(left, right) + across[:, None]).clamp(0, width - 1)
    return frames[torch.arange(len(frames))[:, None, None], rows[:, :, None], columns[:, None, :]], shifts


def shape(frames: Tensor, reference: Tensor, box: Box, but: Box | None = None) -> tuple[float, float, float]:
    """Of a part, over a window: its size over that in the reference; its width for its height, likewise; and how far
    pieces of it are from where that and a turn would put them, in shares of its diagonal, which is distortion.

    `but` is a box that does not count, where lips move.
    """
    edges = _Edges.of(frames[::_EVERY], reference)
    counts = inside(reference, box)
    if but is not None:
        counts &= ~inside(reference, but)
    left, top, right, bottom = box
    across, down = (right - left) / _CELLS, (bottom - top) / _CELLS
    strength = torch.cat(slopes(luma(reference)), 1).square().sum((0, 1))
    places, shifts, weights = [], [], []
    for y, x in itertools.product(range(_CELLS), repeat=2):
        corner = left + x * across, top + y * down
        cell = counts & inside(reference, (*corner, corner[0] + across, corner[1] + down))
        if cell.any():
            shift, fit, _ = _search(edges, cell)
            shifts.append(shift)
            weights.append(fit.clamp(min=0) * strength[cell[:-1, :-1]].sum().sqrt())
            places.append(cell.nonzero().float().mean(0).flip(0))
    size = math.hypot(right - left, bottom - top)
    place = (torch.stack(places) - torch.tensor([(left + right) / 2, (top + bottom) / 2])) / size  # (C, 2)
    moved = place + torch.stack(shifts, 1) / size  # (T, C, 2)
    weight = torch.stack(weights, 1)[..., None].clamp(min=1e-6)  # (T, C, 1)
    known = torch.cat((place, torch.ones(len(place), 1)), 1) * weight
    maps = torch.linalg.lstsq(known, moved * weight).solution  # (T, 3, 2)
    beside = (moved * weight - known @ maps).square().sum((1, 2)) / weight.square().sum((1, 2))
    wider, higher = maps[:, 0].norm(dim=1), maps[:, 1].norm(dim=1)
    return (wider * higher).sqrt().median().item(), (wider / higher).median().item(), beside.sqrt().median().item()


def inside(reference: Tensor, box: Box) -> Tensor:
    """(H, W), true in the box."""
    left, top, right, bottom = (max(0, round(edge)) for edge in box)
    mask = torch.zeros(reference.shape[:2], dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@dataclass(frozen=True, slots=True)
class _Edges:
    """Of frames and of the reference, at the size at which is searched."""

    frames: Tensor  # (T, 2, h, w)
    reference: Tensor  # (1, 2, h, w)
    every: int  # px of the pictures to one of these
    reach: int  # of these

    @classmethod
    def of(cls, frames: Tensor, reference: Tensor) -> "_Edges":
        side = min(reference.shape[:2])
        every = max(1, round(side / _FINE))
        both = (torch.cat(slopes(F.avg_pool2d(luma(pictures), every)), 1) for pictures in (frames, reference))
        return cls(*both, every, round(_REACH * side / every))


def _search(edges: _Edges, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts (T, 2) in px at which the edges of a part (H, W) of the reference are most like a frame's, and their
    cosine (T,) there and without a shift."""
    every, reach = edges.every, edges.reach
    counts = F.avg_pool2d(part[None, None].float(), every)[..., :-1, :-1]
    used = counts[0, 0].nonzero()
    (top, left), (bottom, right) = used.amin(0).tolist(), (used.amax(0) + 1).tolist()
    counts = counts[..., top:bottom, left:right]
    want = edges.reference[..., top:bottom, left:right] * counts
    around = F.pad(edges.frames, (reach,) * 4)[..., top : bottom + 2 * reach, left : right + 2 * reach]
    sizes = _correlate(around.square().sum(1, keepdim=True), counts.square()).clamp(min=1e-6).sqrt()
    fits = _correlate(around, want) / (sizes * want.norm().clamp(min=1e-6))
    best, place = fits.flatten(1).max(1)
    side = 2 * reach + 1
    y, x = place // side, place % side
    each = torch.arange(len(fits))
    shifts = [at - reach + _beyond(line, at) for line, at in ((fits[each, y], x), (fits[each, :, x], y))]
    return torch.stack(shifts, 1) * every, best, fits[:, reach, reach]


def _correlate(pictures: Tensor, pattern: Tensor) -> Tensor:
    """(T, h, w) of (T, C, H, W) and (1, C, H - h + 1, W - w + 1): their product at every shift, over the channels."""
    height, width = pictures.shape[-2:]
    spectrum = (torch.fft.rfft2(pictures) * torch.fft.rfft2(pattern, s=(height, width)).conj()).sum(1)
    rows, columns = height - pattern.shape[-2] + 1, width - pattern.shape[-1] + 1
    return torch.fft.irfft2(spectrum, s=(height, width))[:, :rows, :columns]


def _beyond(fits: Tensor, best: Tensor) -> Tensor:
    """(T,) in -0.5..0.5: where the parabola through the best fit of each row and its neighbours is highest."""
    inner = best.clamp(1, fits.shape[1] - 2)
    left, middle, right = (fits.gather(1, (inner + step)[:, None])[:, 0] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    peak = torch.where(bend < -1e-6, 0.5 * (left - right) / bend.clamp(max=-1e-6), 0)
    return torch.where(inner == best, peak, 0)
