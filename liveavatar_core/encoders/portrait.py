"""The picture as the model sees it: one reference latent, and motion latents of a portrait that holds still."""

from torch import Tensor

from liveavatar_core.encoders.vae import WanVAE
from liveavatar_core.geometry import MOTION_FRAMES, MOTION_LATENTS


def portrait_latents(vae: WanVAE, picture: Tensor, *, mid_sequence: bool = False) -> tuple[Tensor, Tensor]:
    """(3, H, W) in [-1, 1] -> reference (16, 1, h, w) and motion (16, 19, h, w), float32.

    The original has two conventions (SPEC 1.4), not interchangeable in their numbers. By default the reference is a
    first-frame latent, as in its multi-GPU pipeline; with `mid_sequence` it is the second latent of five copies and
    the motion comes from the end of a long still video, as in its single-GPU pipeline.
    """

    def still(frames: int) -> Tensor:
        return vae.encode(picture.unsqueeze(1).expand(-1, frames, -1, -1))

    if mid_sequence:
        return still(5)[:, 1:2], still(5 * MOTION_FRAMES)[:, -MOTION_LATENTS:]
    return still(1), still(MOTION_FRAMES)
