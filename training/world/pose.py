"""How a face stands and moves from frame to frame, and where that puts its mouth."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from training.world.looks import Look

MOUTH_PLACE = 0.50  # of the mouth's middle below the head's, in head sizes


@dataclass(frozen=True, slots=True)
class Pose:
    """Every field is (N, 1, 1, 1), one number a frame."""

    open: Tensor  # 0 closed, 1 as far as speech opens a mouth
    wide: Tensor  # -1 narrow .. 1 spread
    round: Tensor  # 0 .. 1 pursed
    smile: Tensor
    blink: Tensor  # 1: eyes shut
    brow: Tensor  # 1: raised
    yaw: Tensor  # to the picture's right
    pitch: Tensor  # down
    roll: Tensor  # radians, clockwise

    @classmethod
    def still(cls, **given: float) -> "Pose":
        """One frame: straight, eyes open, mouth closed, but for what is given."""
        return cls(*(torch.full((1, 1, 1, 1), float(given.get(field.name, 0))) for field in fields(cls)))

    @classmethod
    def of(cls, frames_NP: Tensor) -> "Pose":
        """From rows of numbers in the order of the fields."""
        return cls(*frames_NP.float().view(len(frames_NP), -1, 1, 1, 1).unbind(1))

    def rows(self) -> Tensor:
        """(N, P), as `of` takes them."""
        return torch.stack([getattr(self, field.name).flatten() for field in fields(self)], 1)

    def to(self, device: torch.device | str) -> "Pose":
        return Pose.of(self.rows().to(device))


def head_centre(look: Look, pose: Pose) -> tuple[Tensor, Tensor]:
    return look.x + 0.10 * pose.yaw, look.y - 0.12 + 0.05 * pose.pitch


def mouth_box(look: Look, pose: Pose) -> Tensor:
    """(N, 4): middle x, middle y, half width and half height of where the mouth can be, in half picture heights."""
    place = 0.16 * pose.yaw, MOUTH_PLACE + 0.10 * pose.pitch + 0.05 * pose.open
    return _box(look, pose, place, look.mouth * 1.35, look.mouth * 1.05)


def eyes_box(look: Look, pose: Pose) -> Tensor:
    """The same for both eyes together."""
    place = 0.16 * pose.yaw, 0.02 + 0.10 * pose.pitch
    return _box(look, pose, place, look.eye_gap + 1.2 * look.eye, 1.4 * look.eye)


def _box(look: Look, pose: Pose, place: tuple[Tensor, Tensor], half_width: float, half_height: float) -> Tensor:
    """`place` and sizes in head sizes."""
    cx, cy = head_centre(look, pose)
    u, v = place
    cos, sin = pose.roll.cos(), pose.roll.sin()
    middle = cx + look.size * (u * cos - v * sin), cy + look.size * (u * sin + v * cos)
    sizes = (torch.full_like(cx, look.size * half) for half in (half_width, half_height))
    return torch.stack([part.flatten() for part in (*middle, *sizes)], 1)
