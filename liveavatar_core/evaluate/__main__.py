"""Measure finished videos.

python -m liveavatar_core.evaluate VIDEO --reference PICTURE [--mouth LEFT TOP RIGHT BOTTOM] [--report FILE.html]
"""

import argparse
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image

from liveavatar_core.encoders.picture import cover
from liveavatar_core.errors import LiveAvatarError
from liveavatar_core.evaluate.footage import length, windows
from liveavatar_core.evaluate.report import as_page, as_text, measure

SECONDS = 2.0  # of a window
MOMENTS = 8  # when no times are given


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="liveavatar_core.evaluate", description="Measure a finished video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="the picture it was made from")
    parser.add_argument(
        "--mouth",
        type=float,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="where the closed mouth is in the video's pixels; without it lips are not measured",
    )
    parser.add_argument("--at", type=float, nargs="+", metavar="SECONDS", help="when to look; default: evenly")
    parser.add_argument("--report", type=Path, help="an HTML file with plots and pictures")
    options = parser.parse_args(arguments)
    whole = length(options.video)
    starts = options.at or [(whole - SECONDS) * i / (MOMENTS - 1) for i in range(MOMENTS)]
    moments, reference = [], None
    for window in windows(options.video, [start for start in starts if start >= 0], SECONDS):
        if reference is None:
            reference = _picture(options.reference, *window.frames.shape[1:3])
        moments.append(measure(window, reference, options.mouth and tuple(options.mouth)))
    if not moments:
        sys.exit(f"{options.video} lasts {whole:.1f} s and has no {SECONDS:g} s where they were asked for")
    print(as_text(moments))
    if options.report is not None:
        options.report.write_text(as_page(options.video.name, reference, moments), encoding="utf-8")


def _picture(path: Path, height: int, width: int) -> torch.Tensor:
    """As the pipeline prepares it: scaled to cover the video's size, cropped in the middle."""
    pixels = torch.from_numpy(numpy.asarray(Image.open(path).convert("RGB")).copy()).float() / 255
    fitted = cover(pixels, height, width)
    return ((fitted + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LiveAvatarError as error:
        sys.exit(str(error))
