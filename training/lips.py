"""How far a mouth is open in a picture of a known face: the opening whose drawing comes nearest."""

from dataclasses import replace

import torch
from torch import Tensor

from training.world.looks import Look
from training.world.painter import paint
from training.world.pose import Pose, mouth_box
from training.world.shapes import grid

OPENINGS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)


def read_opening(frames: Tensor, look: Look, pose: Pose) -> Tensor:
    """frames (N, 3, H, W) in 0..1 of `look`, who stands as `pose` says but for the lips -> (N,) in 0..1."""
    height, width = frames.shape[-2:]
    x, y = grid(height, width, frames.device)
    cx, cy, a, b = mouth_box(look, pose).to(frames.device).T[..., None, None, None]
    near = (((x - cx).abs() < a) & ((y - cy).abs() < b)).float()
    errors = []
    for opening in OPENINGS:
        drawn = paint(look, replace(pose, open=torch.full_like(pose.open, opening)), height, width, frames.device)
        errors.append(((drawn - frames).square() * near).sum((1, 2, 3)))
    return _lowest(torch.stack(errors), torch.tensor(OPENINGS, device=frames.device))


def _lowest(errors: Tensor, places: Tensor) -> Tensor:
    """Where the parabola through the smallest error (K, N) and its neighbours is lowest."""
    best = errors.argmin(0).clamp(1, len(places) - 2)
    x = torch.stack([places[best + i] for i in (-1, 0, 1)])
    e = torch.stack([errors.gather(0, (best + i)[None])[0] for i in (-1, 0, 1)])
    slopes = e.diff(dim=0) / x.diff(dim=0)
    bend = slopes.diff(dim=0)[0] / (x[2] - x[0])
    lowest = (x[0] + x[1]) / 2 - slopes[0] / (2 * bend)
    # the errors of a foreign picture may not be a valley
    return torch.where(bend > 0, lowest, places[errors.argmin(0)]).clamp(0, 1)
