"""Tiny decoders for the latents of the Wan 2.1 VAE (files taew2_1 and lighttaew2_1, kind TAEHV), as a stream.

They are 2d convolutions on single frames; a memory block also sees its own input of the frame before. Owns layout and
arithmetic of the decoder half; the encoder half of a file is not used. The two files have the same names and shapes
but want other latents, which whoever opens the file has to know.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from liveavatar_core.errors import WeightsError
from liveavatar_core.geometry import FRAMES_PER_LATENT, LATENTS_PER_BLOCK

# Layers as the files number them. A stage: three memory blocks, an upsampling without weights, a layer that makes
# more frames of each, a convolution to the next stage's width.
FIRST, LAST = 1, 22
STAGES = (3, 9, 15)  # number of each stage's first layer
MEMORY_BLOCKS, GROW, NEXT = range(3), 4, 5  # layers of a stage, counted from its first
GROWTH = (1, 2, 2)  # frames that a stage makes of one

# Statistics of the Wan 2.1 VAE's latents, from its published configuration.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


class TinyVAE:
    """Weights of one decoder, shared by any number of streams. `weights` have the file's names without "decoder."."""

    def __init__(self, weights: Mapping[str, Tensor], *, normalised: bool) -> None:
        self.weights = weights
        channels = len(LATENT_MEAN)
        mean, std = ([0.0] * channels, [1.0] * channels) if normalised else (LATENT_MEAN, LATENT_STD)
        self.latent_mean, self.latent_std = (
            torch.tensor(values, device=self.device).reshape(-1, 1, 1, 1) for values in (mean, std)
        )

    @property
    def device(self) -> torch.device:
        return self.weights[f"{FIRST}.weight"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[f"{FIRST}.weight"].dtype

    def decode(self, latents: Tensor, past: dict[int, Tensor]) -> Tensor:
        """(16, t, h, w) normalised latents -> (4 t, 3, H, W) in about [0, 1], four frames of each latent.

        `past` holds what memory blocks keep of the frames before, and is left with what they keep of these; empty
        where a sequence begins, whose first three frames then lie before the first that the full VAE has.
        """
        latents = latents.to(self.device, torch.float32) * self.latent_std + self.latent_mean
        x = 3 * torch.tanh(latents / 3)
        x = x.transpose(0, 1).to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = self._conv(f"{FIRST}", x).relu_()
        for first in STAGES:
            for block in MEMORY_BLOCKS:
                x = self._remember(first + block, x, past)
            # The files grow after upsampling; a 1x1 convolution gives the same before it, for a quarter of the work.
            x = F.interpolate(self._grow(first + GROW, x), scale_factor=2)
            x = self._conv(f"{first + NEXT}", x)
        return self._conv(f"{LAST}", x.relu_())

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def _remember(self, layer: int, x: Tensor, past: dict[int, Tensor]) -> Tensor:
        before = past[layer] if layer in past else torch.zeros_like(x[:1])
        past[layer] = x[-1:].clone()
        y = torch.cat([x, torch.cat([before, x[:-1]])], 1)
        for name in (f"{layer}.conv.0", f"{layer}.conv.2"):
            y = self._conv(name, y).relu_()
        return self._conv(f"{layer}.conv.4", y).add_(x).relu_()

    def _grow(self, layer: int, x: Tensor) -> Tensor:
        """(n, C, h, w) -> (n * growth, C, h, w): the first C channels made are the earlier frame."""
        x = self._conv(f"{layer}.conv", x).reshape(-1, *x.shape[1:])
        return x.contiguous(memory_format=torch.channels_last)


class TinyStreamDecoder:
    """One video being decoded piece by piece, however it is cut; the frames of `vae.StreamDecoder`, one for one.

    Memory between calls is one frame per memory block: 45 MB in 16 bits at 704x384.
    """

    def __init__(self, vae: TinyVAE) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Forget the past; the next latent starts a new sequence."""
        self._past: dict[int, Tensor] = {}

    def prime(self, motion: Tensor) -> None:
        """Feed (16, n, h, w) past latents whose pixels nobody needs."""
        self.decode(motion)

    def decode(self, latents: Tensor) -> Tensor:
        """(16, F, h, w), the next latents -> (n, H, W, 3) uint8 on the VAE's device.

        n is 4 F, or 4 F - 3 where the sequence begins. An error while decoding resets the stream.
        """
        channels = len(self.vae.latent_mean)
        if latents.dim() != 4 or latents.shape[0] != channels or latents.shape[1] < 1:
            raise ValueError(f"latents are {tuple(latents.shape)}; ({channels}, 1 or more, h, w) is needed")
        early = 0 if self._past else FRAMES_PER_LATENT - 1
        try:
            # Groups of a block bound the memory of a long call.
            groups = latents.split(LATENTS_PER_BLOCK, 1)
            frames = torch.cat([_to_bytes(self.vae.decode(group, self._past)) for group in groups])
        except BaseException:
            # Some blocks remember these latents and some do not: no later frame could be right.
            self.reset()
            raise
        return frames[early:]


def _to_bytes(frames: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, H, W, 3) uint8, rounded to the nearest."""
    return frames.float().clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def is_tiny(state: Mapping[str, Tensor]) -> bool:
    """Whether a VAE is of the TAEHV kind, for Wan 2.1 or another model."""
    return f"decoder.{LAST}.weight" in state and f"decoder.{STAGES[0]}.conv.0.weight" in state


def load_tiny(
    state: Mapping[str, Tensor], *, normalised: bool, dtype: torch.dtype, device: torch.device | str
) -> TinyVAE:
    """Take a decoder's weights; widths follow from the tensors.

    `normalised`: the file was made for latents as the DiT has them (taew2_1), not for those of the full VAE
    (lighttaew2_1). Raises WeightsError if the tensors are those of another model or are not complete.
    """
    shapes = {name.removeprefix("decoder."): tuple(state[name].shape) for name in state if name.startswith("decoder.")}
    expected = _expected_shapes(shapes)
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        found, needed = shapes.get(wrong[0], "missing"), expected.get(wrong[0], "no such tensor")
        raise WeightsError(
            f"the tiny VAE is not one for Wan 2.1: decoder.{wrong[0]} is {found} where {needed} is needed "
            f"({len(wrong)} such tensors); choose taew2_1 or lighttaew2_1"
        )
    weights = {name: state[f"decoder.{name}"].to(device, dtype) for name in expected}
    for name, tensor in weights.items():
        if tensor.dim() == 4:
            weights[name] = tensor.contiguous(memory_format=torch.channels_last)
    return TinyVAE(weights, normalised=normalised)


def _expected_shapes(found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a decoder whose layers are as wide as those found."""
    widths = [found.get(f"{layer}.weight", (0,))[0] for layer in (FIRST, *(first + NEXT for first in STAGES))]
    shapes = {
        f"{FIRST}.weight": (widths[0], len(LATENT_MEAN), 3, 3),
        f"{FIRST}.bias": (widths[0],),
        f"{LAST}.weight": (3, widths[-1], 3, 3),
        f"{LAST}.bias": (3,),
    }
    for first, growth, (width, following) in zip(STAGES, GROWTH, pairwise(widths), strict=True):
        for block in MEMORY_BLOCKS:
            for conv, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"{first + block}.conv.{conv}.weight"] = (width, inputs, 3, 3)
                shapes[f"{first + block}.conv.{conv}.bias"] = (width,)
        shapes[f"{first + GROW}.conv.weight"] = (growth * width, width, 1, 1)
        shapes[f"{first + NEXT}.weight"] = (following, width, 3, 3)
    return shapes
