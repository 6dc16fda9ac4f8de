"""Somebody who says something: what the model is given, what the right video is, and how near a film comes to it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from liveavatar_core.evaluate.pictures import likeness
from liveavatar_core.evaluate.speech import MAX_LAG, Sync, agreement
from liveavatar_core.geometry import FRAMES_DROPPED
from training.lips import read_opening
from training.sizes import SIDE
from training.speech.sounds import Sound
from training.world.looks import Look, draw_look
from training.world.motion import perform
from training.world.painter import paint
from training.world.pose import Pose

PROMPTS = {
    "portrait": "A person is talking to the camera",
    "anime": "An anime girl is talking to the camera",
    "game": "A game character is talking to the camera",
}
JUDGED_AT = 128  # px: a quarter of the work, and as good


@dataclass(frozen=True, slots=True)
class Role:
    picture: Look
    sound: Sound
    prompt: str
    video: Look  # as the prompt wants it
    action: str = "talk"

    def still(self) -> Tensor:
        """(3, H, W) in 0..1: the picture that the video is made from."""
        return paint(self.picture, Pose.still(), SIDE, SIDE)[0]

    def samples(self) -> Tensor:
        return torch.from_numpy(self.sound.samples)

    def poses(self, first: int, frames: int) -> Pose:
        """Of frames as they are shown; the clock also counts those that a stream drops."""
        return perform(self.sound.mouth, self.action, first, frames, first + FRAMES_DROPPED)

    def truth(self, first: int, frames: int, side: int = SIDE, device: torch.device | str = "cpu") -> Tensor:
        """(frames, side, side, 3) in 8 bits."""
        drawn = paint(self.video, self.poses(first, frames), side, side, device)
        return (drawn.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def plain_role(kind: str, seed: int, sound: Sound) -> Role:
    """An unseen face with a prompt that changes nothing in the picture."""
    look = draw_look(seed, kind, held_out=True)
    return Role(look, sound, PROMPTS[kind], look)


@dataclass(frozen=True, slots=True)
class Take:
    """A film of a role, from its frame `first` on."""

    role: Role
    frames: Tensor = field(repr=False)  # (T, H, W, 3) in 8 bits
    first: int = 0

    def opening(self) -> Tensor:
        """(T,) in 0..1, as the pictures show it."""
        planes = self.small().permute(0, 3, 1, 2) / 255
        return read_opening(planes, self.role.video, self.role.poses(self.first, len(self.frames)))

    def said(self) -> Tensor:
        """(T,) in 0..1, as the phonemes want it."""
        return self.role.poses(self.first, len(self.frames)).open.flatten()

    def lips(self, max_lag: int = MAX_LAG) -> Sync:
        return agreement(self.opening(), self.said(), max_lag)

    def identity(self) -> float:
        """Likeness to the right video, mean over the frames."""
        pairs = zip(self.small(), self.right(), strict=True)
        return torch.cat([likeness(made[None], right) for made, right in pairs]).mean().item()

    def error(self) -> float:
        """Root of the mean square error to the right video; 1 is from black to white."""
        return ((self.small() - self.right()) / 255).square().mean().sqrt().item()

    def small(self) -> Tensor:
        """(T, 128, 128, 3) in 0..255."""
        planes = self.frames.permute(0, 3, 1, 2).float()
        return avg_pool2d(planes, planes.shape[2] // JUDGED_AT).permute(0, 2, 3, 1)

    def right(self) -> Tensor:
        """The right video in this size."""
        return self.role.truth(self.first, len(self.frames), JUDGED_AT, self.frames.device).float()
