"""Signed distances of plain shapes, textures, and the paint that fills them.

A pixel's colour is a formula of its place, so all frames of a clip are drawn at once, on a CPU or a GPU, at any size.
Distances are in the units of the coordinates, negative inside; near the border they are right to first order, which
is all that antialiasing needs.
Legend: N frames, H W pixels. Fields are (N, 1, H, W), images (N, 3, H, W), what moves (N, 1, 1, 1); N is 1 for
whatever stands still.
"""

import math

import torch
from torch import Tensor

Scalar = Tensor | float


def grid(height: int, width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """x to the right and y downwards, 0 in the middle; y runs from -1 to 1, x as far as the picture's shape says."""
    y = (torch.arange(height, device=device) + 0.5) * (2 / height) - 1
    x = ((torch.arange(width, device=device) + 0.5) * 2 - width) / height
    return x.expand(1, 1, height, width), y[:, None].expand(1, 1, height, width)


def turn(x: Tensor, y: Tensor, angle: Scalar) -> tuple[Tensor, Tensor]:
    """The coordinates of a frame that is turned clockwise by `angle`."""
    moves = isinstance(angle, Tensor)
    cos, sin = (angle.cos(), angle.sin()) if moves else (math.cos(angle), math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def ellipse(x: Tensor, y: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """Half axes a and b around 0."""
    p, q = x / a, y / b
    slope = ((p / a) ** 2 + (q / b) ** 2).sqrt()
    near = (p * p + q * q - 1) / (2 * slope).clamp(min=1e-4)
    # far from a thin ellipse that is too small; its box is a lower bound
    return torch.maximum(near, torch.maximum(x.abs() - a, y.abs() - b))


def box(x: Tensor, y: Tensor, a: Scalar, b: Scalar, corner: float = 0.0) -> Tensor:
    """Half sides a and b around 0, with round corners."""
    dx, dy = x.abs() - a + corner, y.abs() - b + corner
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def stroke(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float], radius: Scalar) -> Tensor:
    """A line with round ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    x, y = x - start[0], y - start[1]
    along = ((x * dx + y * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - along * dx, y - along * dy) - radius


def union(*distances: Tensor) -> Tensor:
    whole, *rest = distances
    for distance in rest:
        whole = torch.minimum(whole, distance)
    return whole


def common(*distances: Tensor) -> Tensor:
    """Where all of them are."""
    whole, *rest = distances
    for distance in rest:
        whole = torch.maximum(whole, distance)
    return whole


def zigzag(x: Tensor) -> Tensor:
    """0 at whole numbers, 1 between them, in straight lines."""
    return 1 - (2 * (x - x.floor()) - 1).abs()


def spot(x: Tensor, y: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """A soft spot, 1 in its middle."""
    return torch.exp(-((x / a) ** 2) - (y / b) ** 2)


def ramp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """0 at `low`, 1 at `high`, smooth between and constant beyond."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def chance(i: Tensor, j: Tensor | int, seed: int) -> Tensor:
    """A number in 0..1 for every pair of whole numbers, without pattern to the eye."""
    j = j.long() if isinstance(j, Tensor) else j
    mixed = (i.long() * 73_856_093) ^ (j * 19_349_663) ^ (seed * 83_492_791)
    mixed = ((mixed ^ (mixed >> 13)) * 1_274_126_177) & 0x7FFFFFFF
    return ((mixed ^ (mixed >> 11)) & 0xFFFF).float() / 0xFFFF


def noise(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Smooth noise in 0..1 with one knot per unit."""
    x0, y0 = x.floor(), y.floor()
    fx, fy = ramp(x - x0, 0, 1), ramp(y - y0, 0, 1)
    top = torch.lerp(chance(x0, y0, seed), chance(x0 + 1, y0, seed), fx)
    bottom = torch.lerp(chance(x0, y0 + 1, seed), chance(x0 + 1, y0 + 1, seed), fx)
    return torch.lerp(top, bottom, fy)


def strands(u: Tensor, v: Tensor, seed: int) -> Tensor:
    """Hair that falls along v, -1..1: far cheaper than noise, for what moves from frame to frame."""
    wavy = u + 0.03 * torch.sin(4 * v + seed % 7)
    return (torch.sin(47 * wavy + seed % 5) + torch.sin(83 * wavy + 2 * v) * torch.sin(19 * u - 1.7 * v)) * 0.5


def cover(distance: Tensor, softness: Scalar) -> Tensor:
    """Share of each pixel inside a shape whose border is `softness` wide: one pixel for sharp shapes."""
    return (0.5 - distance / softness).clamp(0, 1)


def over(image: Tensor, colour: Tensor, alpha: Tensor | float) -> Tensor:
    """`colour`, one or an image, laid over the image where `alpha` is 1."""
    return image + (colour - image) * alpha
