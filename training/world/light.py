"""Lamps and the colour grade over the finished picture."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from training.world.looks import Colour
from training.world.shapes import Scalar, ramp

_LUMA = (0.30, 0.59, 0.11)

# light from everywhere, from the lamp, from the other side; where the lamp is: right, down, towards us
_LIGHTS: dict[str, tuple[Colour, Colour, Colour, Colour]] = {
    "neutral": ((0.60, 0.60, 0.60), (0.48, 0.48, 0.48), (0, 0, 0), (-0.35, -0.45, 0.82)),
    "studio": ((0.74, 0.74, 0.75), (0.36, 0.36, 0.36), (0.10, 0.10, 0.10), (0.10, -0.40, 0.91)),
    "warm": ((0.66, 0.54, 0.42), (0.60, 0.47, 0.30), (0.05, 0.02, 0), (-0.35, -0.30, 0.88)),
    "daylight": ((0.58, 0.66, 0.78), (0.48, 0.52, 0.56), (0, 0, 0.05), (0.40, -0.60, 0.69)),
    "golden": ((0.50, 0.38, 0.34), (0.95, 0.60, 0.24), (0.05, 0.02, 0.10), (0.75, -0.20, 0.63)),
    "side": ((0.20, 0.20, 0.24), (0.98, 0.95, 0.90), (0, 0, 0), (-0.94, -0.10, 0.32)),
    "neon": ((0.30, 0.24, 0.42), (0.75, 0.14, 0.58), (0.06, 0.62, 0.78), (-0.88, -0.05, 0.47)),
    "candle": ((0.30, 0.20, 0.13), (0.82, 0.50, 0.20), (0, 0, 0), (0.25, 0.62, 0.74)),
}
# saturation, contrast, share of white, tint
_GRADES: dict[str, tuple[float, float, float, Colour]] = {
    "none": (1.0, 1.0, 0.0, (1, 1, 1)),
    "film": (0.0, 1.15, 0.0, (1, 1, 1)),
    "oil": (0.75, 1.12, 0.0, (1.06, 0.97, 0.78)),
    "vivid": (1.6, 1.06, 0.0, (1.02, 1.0, 1.0)),
    "pastel": (0.8, 0.85, 0.28, (1, 0.98, 1.02)),
}


@dataclass(frozen=True, slots=True)
class Light:
    ambient: Tensor  # (3, 1, 1)
    key: Tensor  # (3, 1, 1)
    other: Tensor | None  # (3, 1, 1)
    direction: Colour
    cel: bool  # shadows have one hard edge, as in drawings

    def on(self, nx: Scalar = 0.0, ny: Scalar = 0.0) -> Tensor:
        """Colour that falls on a surface that leans by (nx, ny), each within -1..1."""
        dx, dy, dz = self.direction
        if isinstance(nx, float) and isinstance(ny, float):
            nx, ny = self.key.new_full((), nx), self.key.new_full((), ny)
        nz = (1 - nx * nx - ny * ny).clamp(min=0.02).sqrt()
        facing = (nx * dx + ny * dy + nz * dz).clamp(0, 1)
        if self.cel:
            facing = 0.30 + 0.55 * ramp(facing, 0.42, 0.46)
        light = self.ambient + self.key * facing
        if self.other is None:
            return light
        return light + self.other * (0.4 * nz - 0.15 - 0.9 * nx * (1 if dx > 0 else -1)).clamp(0, 1)


@cache
def light(name: str, *, cel: bool, device: torch.device | str) -> Light:
    *colours, direction = _LIGHTS[name]
    ambient, key, other = (torch.tensor(colour, device=device).view(3, 1, 1) for colour in colours)
    return Light(ambient, key, other if any(colours[2]) else None, direction, cel)


def grade(image: Tensor, name: str) -> Tensor:
    saturation, contrast, white, tint = _GRADES[name]
    if name != "none":
        grey = (image * image.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        image = grey + (image - grey) * saturation
        image = ((image - 0.5) * contrast + 0.5) * image.new_tensor(tint).view(3, 1, 1)
        image = image + (1 - image) * white
    return image.clamp(0, 1)


def turned(image: Tensor, angle: float) -> Tensor:
    """(N, 3, H, W) with all hues turned by radians; greys stay."""
    around, other = math.sin(angle) / math.sqrt(3), (1 - math.cos(angle)) / 3
    own, before, after = other + math.cos(angle), other - around, other + around
    mixed = image.new_tensor([[own, before, after], [after, own, before], [before, after, own]])
    return torch.einsum("ij,njhw->nihw", mixed, image).clamp(0, 1)
