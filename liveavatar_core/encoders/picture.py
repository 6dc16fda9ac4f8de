"""A person's picture to the pixels the VAE encodes, and what to tell the person about it.

Owns resizing, cropping and transparency. Does not choose the size (geometry does) and does not know the VAE.
"""

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from liveavatar_core.errors import InputError
from liveavatar_core.geometry import check_picture

# What transparent pixels become: 0 in [-1, 1], the value that pulls neither the face nor its rim towards light or dark.
BACKDROP = 0.5
SMALL_SIDE = 256  # px; below it a face has too few pixels for the sizes the model makes
UNUSUAL_ASPECT = 3.0
WORKING_AREA = 704 * 384  # px; a larger picture is judged as the video will show it
DARK, BRIGHT = 0.1, 0.95  # median brightness of the middle, where the face should be
FLAT = 0.1  # difference between the bright and the dark parts of a picture of nothing
SOFT_EDGE = 0.06  # of that difference, between neighbours on the sharpest edge: blurred over more than six pixels


def cover(picture: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3 or 4) in 0..1 -> (3, height, width) in [-1, 1]: scaled until it covers the size, centre cropped.

    Antialiased bilinear, never with bars. Raises InputError for pictures that cannot be used.
    """
    pixels = _flatten(picture)
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    rows, columns = (
        max(least, round(side * scale)) for least, side in zip((height, width), pixels.shape[1:], strict=True)
    )
    scaled = interpolate(pixels[None], (rows, columns), mode="bilinear", antialias=True)[0]
    top, left = (rows - height) // 2, (columns - width) // 2
    return scaled[:, top : top + height, left : left + width].clamp(0, 1) * 2 - 1


def reference_crop(picture: Tensor, height: int, width: int) -> Tensor:
    """Like `cover`, but as the original prepares its pictures, black bars included (SPEC 1.3).

    The picture's shorter side becomes the shorter of the size's sides, whichever way round they lie; what is missing
    is black. 8-bit, resized by PIL.
    """
    pixels = (_flatten(picture) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    short = min(height, width)
    rows, columns = pixels.shape[:2]
    size = (short, int(short * rows / columns)) if columns <= rows else (int(short * columns / rows), short)
    scaled = torch.from_numpy(numpy.array(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)))
    canvas = torch.zeros(height, width, 3, dtype=torch.uint8)
    (to_y, from_y), (to_x, from_x) = _centre(scaled.shape[0], height), _centre(scaled.shape[1], width)
    canvas[to_y, to_x] = scaled[from_y, from_x]
    return canvas.permute(2, 0, 1).float() / 255 * 2 - 1


def _centre(side: int, target: int) -> tuple[slice, slice]:
    """Where a side lands on the target and what of it is kept; odd pixels go as in the original's library."""
    if side < target:
        start = (target - side) // 2
        return slice(start, start + side), slice(0, side)
    start = round((side - target) / 2)
    return slice(0, target), slice(start, start + target)


def picture_warnings(picture: Tensor) -> list[str]:
    """Sentences about an (h, w, 3 or 4) picture that can be used but may disappoint."""
    height, width, channels = picture.shape
    warnings = []
    if min(height, width) < SMALL_SIDE:
        warnings.append(f"the picture is only {width}x{height} px and the video will look soft: use a larger one")
    if max(height, width) > UNUSUAL_ASPECT * min(height, width):
        warnings.append(
            f"the picture is {width}x{height} px, very long, which leaves the face few pixels: crop it to head and "
            "shoulders"
        )
    if channels == 4 and picture[..., 3].min() < 1:
        warnings.append("the picture is transparent in places, which are filled with grey: give it a background")
    return warnings + _light_and_focus(_flatten(picture))


def _light_and_focus(pixels: Tensor) -> list[str]:
    """Sentences about (3, h, w): too dark, too bright, empty, blurred. Whether it has a face is for people to see."""
    scale = (WORKING_AREA / (pixels.shape[1] * pixels.shape[2])) ** 0.5
    if scale < 1:
        pixels = interpolate(pixels[None], scale_factor=scale, mode="bilinear", antialias=True)[0]
    grey = pixels.mean(0)
    height, width = grey.shape
    middle = grey[height // 4 : -(height // 4), width // 4 : -(width // 4)].median().item()
    low, high = numpy.quantile(grey.numpy(), (0.01, 0.99))
    warnings = []
    if middle < DARK:
        warnings.append("the middle of the picture is very dark: use one with light on the face")
    if middle > BRIGHT:
        warnings.append("the middle of the picture is almost white: use one that is less exposed")
    if high - low < FLAT:
        return warnings or ["the picture is almost of one brightness, with nothing to see in it: use another"]
    steps = [difference.abs().numpy().ravel() for difference in (grey.diff(dim=0), grey.diff(dim=1))]
    if numpy.quantile(numpy.concatenate(steps), 0.999) < SOFT_EDGE * (high - low):
        warnings.append("the picture is blurred everywhere: use a sharper one")
    return warnings


def _flatten(picture: Tensor) -> Tensor:
    """(h, w, 3 or 4) in 0..1 -> (3, h, w) float32 on the CPU without transparency."""
    if picture.dim() != 3 or picture.shape[2] not in (3, 4):
        raise InputError(
            f"the picture's shape is {tuple(picture.shape)}; (height, width, 3 or 4 channels) is needed: use one in "
            "colour"
        )
    check_picture(*picture.shape[:2])
    pixels = picture.detach().float().cpu().permute(2, 0, 1)
    if not pixels.isfinite().all():
        raise InputError("the picture contains values that are not finite numbers; load it again")
    pixels = pixels.clamp(0, 1)
    if len(pixels) == 4:
        alpha = pixels[3]
        pixels = pixels[:3] * alpha + BACKDROP * (1 - alpha)
    return pixels
