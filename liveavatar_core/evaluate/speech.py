"""Figures of talking: how far a mouth is open in every frame, how loud the sound is, and whether the two agree."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.geometry import sample_at

MAX_LAG = 10  # frames
_MOUTH = (16, 24)  # height and width to which mouths are brought
_NUDGES = (-2, -1, 0, 1, 2)  # px of that, by which a mouth may be beside its box
_VOWELS = 400, 1200  # Hz
_FLOOR = 1e-3  # of full scale; quieter is silence


@dataclass(frozen=True, slots=True)
class Sync:
    """Agreement of a mouth and a sound."""

    correlation: float  # as they are
    best: float  # at the lag that fits best
    lag: int  # frames by which the mouth is late


def mouths(frames: Tensor, boxes: Tensor) -> Tensor:
    """frames (T, H, W, 3) in 8 bits, boxes (T or 1, 4) left, top, right, bottom in px -> (T, 3, 16, 24) in 0..1."""
    count, height, width = frames.shape[:3]
    boxes = boxes.to(frames.device).float().expand(count, -1)
    left, top, right, bottom = boxes.unbind(1)
    scale_x, scale_y = (right - left) / width, (bottom - top) / height
    middle_x, middle_y = (left + right) / width - 1, (top + bottom) / height - 1
    zero = torch.zeros_like(left)
    rows = (torch.stack((scale_x, zero, middle_x), 1), torch.stack((zero, scale_y, middle_y), 1))
    place = F.affine_grid(torch.stack(rows, 1), [count, 3, *_MOUTH], align_corners=False)
    return F.grid_sample(frames.permute(0, 3, 1, 2).float() / 255, place, mode="bilinear", align_corners=False)


def opening(frames: Tensor, boxes: Tensor, closed: Tensor, closed_box: Tensor) -> Tensor:
    """(T,) from 0: how much the mouths differ from that of `closed` (H, W, 3), a picture with the lips together.

    What changes between lips is what opens. Overall light is taken out, and the best of a few nudges is taken.
    """
    want = mouths(closed[None], closed_box[None])
    got = mouths(frames, boxes)

    def inner(x: Tensor, dy: int = 0, dx: int = 0) -> Tensor:
        height, width = x.shape[-2:]
        return x[..., 2 + dy : height - 2 + dy, 2 + dx : width - 2 + dx]

    got = got * (_middle(want) / _middle(got).clamp(min=0.02))
    errors = [(inner(got, dy, dx) - inner(want)).abs().mean((1, 2, 3)) for dy in _NUDGES for dx in _NUDGES]
    return torch.stack(errors).amin(0)


def _middle(pictures: Tensor) -> Tensor:
    """The median colour, (N, 3, 1, 1): of the skin, unless the mouth fills its box."""
    return pictures.flatten(2).median(2).values[..., None, None]


def loudness(samples: Tensor, rate: int, frames: int, fps: int) -> Tensor:
    """samples (N,) mono -> (frames,) from 0: how loud vowels are while each frame is shown, logarithmic, by their
    own height. A hiss is loud with the mouth shut, so only the band counts in which open mouths are loud."""
    spectrum, pitches = torch.fft.rfft(samples), torch.fft.rfftfreq(len(samples), 1 / rate)
    low, high = _VOWELS
    heard = torch.fft.irfft(spectrum * ((pitches > low) & (pitches < high)), n=len(samples))
    levels = []
    for frame in range(frames):
        part = heard[sample_at(frame, fps, rate) : sample_at(frame + 1, fps, rate)]
        levels.append(part.square().mean().sqrt() if len(part) else samples.new_zeros(()))
    level = torch.stack(levels)
    return torch.log1p(level / (0.2 * level.max() + _FLOOR))


def agreement(mouth: Tensor, speech: Tensor, max_lag: int = MAX_LAG) -> Sync:
    """Of a mouth's opening and a sound's loudness or known opening, both (T,)."""
    if len(mouth) != len(speech) or len(mouth) < 4 * max_lag:
        raise ValueError(
            f"the mouth has {len(mouth)} frames, the speech {len(speech)}; as many are needed, {4 * max_lag} at least"
        )
    mouth, speech = mouth.float().cpu(), speech.float().cpu()
    inner = speech[max_lag : len(speech) - max_lag]
    fits = {
        lag: _correlation(mouth[max_lag + lag : len(mouth) - max_lag + lag], inner)
        for lag in range(-max_lag, max_lag + 1)
    }
    lag = max(fits, key=lambda lag: (fits[lag], -abs(lag)))
    return Sync(fits[0], fits[lag], lag)


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = (a.norm() * b.norm()).item()
    return (a @ b).item() / size if size > 1e-9 else 0.0  # what does not move agrees with nothing
