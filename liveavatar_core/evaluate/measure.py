"""All figures of a video over its time, window by window, and what they are called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from liveavatar_core.errors import InputError
from liveavatar_core.evaluate.footage import Window, length, windows
from liveavatar_core.evaluate.pictures import (
    colour_shift,
    exposure,
    flicker,
    histogram_overlap,
    likeness,
    sharpness,
    structure,
)
from liveavatar_core.evaluate.places import PARTS, Places, Reference, at_size
from liveavatar_core.evaluate.speech import agreement, loudness, opening
from liveavatar_core.evaluate.tracking import Box, follow, inside, shape, track_mouth

SECONDS = 2.0  # of a window
LIPS_FIT = 0.4  # correlation from which on a lag says something
TIMES = (0, 3, 10, 30, 60, 180, 600)  # s, at which windows begin when no times are given


class Figure(NamedTuple):
    meaning: str
    step: float  # a difference that means something: harmless changes make smaller ones (tests/test_evaluate_bench.py)


FIGURES = {
    "lips": Figure("correlation of mouth opening and loudness", 0.2),
    "lips late": Figure("frames by which the mouth is late, at the best fit", 1.5),
    "likeness": Figure("cosine to the reference, 1 for the same", 0.03),
    "colours": Figure("share of the colour histogram in common", 0.05),
    "structure": Figure("SSIM outside the mouth, to the reference", 0.15),
    "sharpness": Figure("strongest edges over those of the reference", 0.1),
    "brightness": Figure("mean luma, 0 to 1", 0.03),
    "clipped": Figure("share of pixels at black or white", 0.01),
    "colour shift": Figure("distance of the mean colours, 8-bit steps", 4.0),
    "flicker": Figure("8-bit steps by which a pixel jumps to and fro", 2.0),
    "growth": Figure("size, over that in the reference", 0.03),
    "stretch": Figure("width for height, over the reference's", 0.04),
    "distortion": Figure("pieces out of place, share of the diagonal", 0.015),
    "kept": Figure("SSIM to the reference, wherever it is now", 0.15),
    "moved": Figure("way from where it was, share of the picture's height", 0.02),
}


def figure(name: str) -> Figure:
    """Of a part, as "eyes sharpness", too."""
    part, _, rest = name.partition(" ")
    return FIGURES[rest if part in PARTS else name]


@dataclass(frozen=True, slots=True)
class Moment:
    """One window's figures, and its middle frame to look at."""

    start: float
    figures: dict[str, float]
    picture: Tensor  # (H, W, 3)


def measure_video(
    video: Path,
    picture: Tensor,
    places: Places,
    starts: Sequence[float] = TIMES,
    on_window: Callable[[float], None] = lambda start: None,
) -> tuple[Reference, list[Moment]]:
    """`picture` (H, W, 3 or 4) in 0..1 is what the video was made from, `places` where things are in it."""
    reference, moments = None, []
    for window in windows(video, starts, SECONDS):
        if reference is None:
            reference = at_size(picture, places, *window.frames.shape[1:3])
        on_window(window.start)
        moments.append(measure(window, reference))
    if reference is None:
        raise InputError(f"{video} lasts {length(video):.1f} s; {SECONDS:g} s from {min(starts):g} s on are needed")
    return reference, moments


def measure(window: Window, reference: Reference) -> Moment:
    frames, picture, mouth = window.frames, reference.picture, reference.places.mouth
    height, width = picture.shape[:2]
    whole = (0.0, 0.0, float(width), float(height))
    figures = {}
    where = None
    if mouth is not None:
        where = ~inside(picture, mouth)
        if window.sound is not None:
            figures |= _lips(window, picture, mouth)
    brightness, clipped = exposure(frames)
    figures |= {
        "likeness": likeness(frames, picture).mean().item(),
        "colours": histogram_overlap(frames, picture).mean().item(),
        "structure": structure(frames, picture, where).mean().item(),
        "sharpness": sharpness(frames, picture).mean().item(),
        "brightness": brightness.mean().item(),
        "clipped": clipped.mean().item(),
        "colour shift": colour_shift(frames, picture).mean().item(),
        "flicker": flicker(frames),
        **_shape(frames, picture, whole, mouth),
    }
    for part, box in reference.places.parts.items():
        found = _part(frames, picture, box, mouth, part)
        figures |= {f"{part} {name}": found[name] for name in PARTS[part]}
    return Moment(window.start, figures, frames[len(frames) // 2])


def _lips(window: Window, picture: Tensor, mouth: Box) -> dict[str, float]:
    frames = window.frames
    opened = opening(frames, track_mouth(frames, picture, mouth), picture, torch.tensor(mouth))
    sync = agreement(opened, loudness(window.sound, window.rate, len(frames), window.fps))
    lag = {"lips late": float(sync.lag)} if sync.best > LIPS_FIT else {}
    return {"lips": sync.correlation, **lag}


def _shape(frames: Tensor, picture: Tensor, box: Box, mouth: Box | None) -> dict[str, float]:
    return dict(zip(("growth", "stretch", "distortion"), shape(frames, picture, box, mouth), strict=True))


def _part(frames: Tensor, picture: Tensor, box: Box, mouth: Box | None, part: str) -> dict[str, float]:
    if part == "head":
        return _shape(frames, picture, box, mouth)
    found, shifts = follow(frames, picture, box)
    wanted = follow(picture[None], picture, box)[0][0]
    return {
        "sharpness": sharpness(found, wanted).median().item(),  # a blink is no loss
        "kept": structure(found, wanted).median().item(),
        "moved": shifts.norm(dim=1).median().item() / len(picture),
    }
