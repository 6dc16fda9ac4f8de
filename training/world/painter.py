"""Looks and poses to pictures, back to front."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from training.world.body import behind, body, held
from training.world.brush import Brush
from training.world.hair import hair_behind, hair_in_front, worn
from training.world.head import beard, eyes, glasses, head, mouth, nose
from training.world.light import grade, light
from training.world.looks import Look
from training.world.pose import MOUTH_PLACE, Pose, head_centre
from training.world.scenes import background
from training.world.shapes import grid, turn

# What moves, with the part of the head it stays in: left and right, top and bottom, in head sizes. Nothing else is
# computed, which is most of the speed.
_PARTS = (
    (head, 1.50, -1.2, 1.5),
    (eyes, 0.95, -0.75, 0.55),
    (nose, 0.80, -0.5, 0.95),
    (beard, 1.2, -0.2, 1.95),
    (mouth, 0.65, MOUTH_PLACE - 0.4, MOUTH_PLACE + 0.5),
    (hair_in_front, 1.5, -1.4, 1.6),
    (glasses, 1.1, -0.5, 0.6),
    (worn, 1.8, -1.7, 1.7),
)
_REACH = 0.25  # by which a pose moves a part, in head sizes


def paint(look: Look, pose: Pose, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(N, 3, height, width) float32 in 0..1, one picture for every frame of the pose."""
    pose = pose.to(device)
    x, y = grid(height, width, device)
    pixel = 2.4 / height
    lamp = light(look.light, cel=look.kind == "anime", device=device)
    image = background(x, y, look, pixel) * replace(lamp, cel=False).on(x * 0.45, y * 0.45).clamp(max=1.6)

    size = look.size
    torso = Brush(look, lamp, (x - look.x) / size, (y - look.y + 0.12) / size, pixel / size)
    cx, cy = head_centre(look, pose)
    face = Brush(look, lamp, *turn((x - cx) / size, (y - cy) / size, pose.roll), pixel / size)

    image = behind(image, torso)
    image = hair_behind(image, face, pose).expand(len(pose.open), -1, -1, -1)
    image = body(image, torso)
    for part, half, top, bottom in _PARTS:
        rows = _pixels(look.y - 0.12 + size * (top - _REACH), look.y - 0.12 + size * (bottom + _REACH), height, height)
        columns = _pixels(look.x - size * (half + _REACH), look.x + size * (half + _REACH), width, height)
        near = replace(face, u=face.u[..., rows, columns], v=face.v[..., rows, columns])
        image[..., rows, columns] = part(image[..., rows, columns], near, pose)
    return grade(held(image, torso), look.grade)


def _pixels(low: float, high: float, count: int, height: int) -> slice:
    """Those of `count` pixels of a row or a column whose middles are within low..high, in half picture heights."""
    start, stop = (math.ceil((place * height + count - 1) / 2) for place in (low, high))
    return slice(max(0, start), max(0, min(count, stop)))
