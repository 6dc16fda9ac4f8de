"""FramePack: past latents become few tokens, the coarser the older they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveavatar_core.geometry import MOTION_LATENTS

_BUCKETS = (1, 2, 16)  # latents per bucket, newest bucket first


class FramePacker(nn.Module):
    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.proj_2x = nn.Conv3d(channels, dim, (2, 4, 4), (2, 4, 4))
        self.proj_4x = nn.Conv3d(channels, dim, (4, 8, 8), (4, 8, 8))

    def forward(self, motion_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, motion_tokens, D), newest bucket first. Missing older latents count as zeros."""
        motion = motion_BCFhw[:, :, -MOTION_LATENTS:]
        motion = F.pad(motion, (0, 0, 0, 0, MOTION_LATENTS - motion.shape[2], 0))
        far, middle, near = motion.split(_BUCKETS[::-1], dim=2)
        parts = (self.proj(near), self.proj_2x(middle), self.proj_4x(far))
        return torch.cat([part.flatten(2).transpose(1, 2) for part in parts], dim=1)
