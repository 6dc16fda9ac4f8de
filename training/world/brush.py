"""What every part of the painter shares: a look, its light, and a coordinate frame to paint in."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from training.world.light import Light
from training.world.looks import Look
from training.world.shapes import Scalar, cover, over


def rgb(colour: str | tuple[float, float, float], like: Tensor) -> Tensor:
    """A colour, in hex or as numbers in 0..1, as (3, 1, 1)."""
    if isinstance(colour, str):
        colour = tuple(int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return _colour(colour, like.device)


@cache
def _colour(rgb: tuple[float, float, float], device: torch.device) -> Tensor:
    """Kept: a GPU that is given a number waits for all that it was told before."""
    return torch.tensor(rgb, dtype=torch.float32, device=device).view(3, 1, 1)


@dataclass(frozen=True, slots=True)
class Brush:
    look: Look
    light: Light
    u: Tensor  # to the right, in head sizes
    v: Tensor  # downwards
    pixel: float  # width of antialiasing in this frame's units

    @property
    def line(self) -> float:
        """Width of outlines; a portrait has none."""
        return {"portrait": 0.0, "anime": 0.030, "game": 0.020}[self.look.kind]

    def colour(self, name: str) -> Tensor:
        """One of the look's colours, (3, 1, 1)."""
        return rgb(getattr(self.look, name), self.u)

    def fill(
        self,
        image: Tensor,
        distance: Tensor,
        colour: Tensor,
        lean: tuple[Scalar, Scalar] = (0.0, 0.0),
        *,
        outline: float = 1.0,
        alpha: Scalar = 1.0,
        soft: float = 0.0,
    ) -> Tensor:
        """Paint a shape: its outline in the class's width, then its colour lit as the surface leans."""
        if outline and self.line:
            ink = self.colour("hair") * 0.18
            image = over(image, ink, cover(distance - self.line * outline, self.pixel) * alpha)
        return over(image, colour * self.light.on(*lean), cover(distance, self.pixel + soft) * alpha)

    def flat(self, image: Tensor, distance: Tensor, colour: Tensor, alpha: Scalar = 1.0) -> Tensor:
        """Paint a shape in a colour that no light changes."""
        return over(image, colour, cover(distance, self.pixel) * alpha)
