"""Windows of a video file: frames as they are shown, and the sound that belongs to them.

PyAV is imported where a file is read: who has frames already can measure them without it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from liveavatar_core.errors import InputError

if TYPE_CHECKING:
    import av


MICROSECONDS = 1_000_000  # to a second: the unit of a file's duration


@dataclass(frozen=True, slots=True)
class Window:
    start: float  # s
    fps: int
    frames: Tensor  # (T, H, W, 3) in 8 bits
    sound: Tensor | None  # (N,) mono float32
    rate: int


def length(path: Path) -> float:
    """Seconds of picture. Raises InputError for what is no video."""
    with _open(path) as file:
        stream = file.streams.video[0]
        if stream.duration:
            return float(stream.duration * stream.time_base)
        return float(file.duration or 0) / MICROSECONDS


def windows(path: Path, starts: Sequence[float], seconds: float) -> Iterator[Window]:
    """Those of the windows that lie whole in the video."""
    with _open(path) as file:
        picture = file.streams.video[0]
        fps = round(picture.average_rate)
        count = round(seconds * fps)
        for start in sorted(starts):
            frames = [frame for _, frame in zip(range(count), _frames(file, picture, start), strict=False)]
            if len(frames) < count:
                return
            pixels = torch.from_numpy(numpy.stack([frame.to_ndarray(format="rgb24") for frame in frames]))
            sound, rate = _sound(file, start, seconds)
            yield Window(start, fps, pixels, sound, rate)


def _open(path: Path):
    import av

    try:
        file = av.open(str(path))
    except (OSError, av.FFmpegError) as error:
        raise InputError(f"the video {path} cannot be read ({error}); give a file FFmpeg knows") from error
    if not file.streams.video:
        file.close()
        raise InputError(f"{path} has no picture; give a video")
    return file


def _frames(file, stream, start: float) -> "Iterator[av.VideoFrame]":
    """Frames shown from `start` on."""
    first = round(start * stream.average_rate)
    file.seek(int(start / stream.time_base), stream=stream)  # to a key frame before it
    for frame in file.decode(stream):
        if frame.pts is not None and round(frame.pts * stream.time_base * stream.average_rate) >= first:
            yield frame


def _sound(file, start: float, seconds: float) -> tuple[Tensor | None, int]:
    import av

    if not file.streams.audio:
        return None, 0
    stream = file.streams.audio[0]
    rate = stream.rate
    heard = torch.zeros(round(seconds * rate))
    file.seek(int(max(0.0, start - 0.2) / stream.time_base), stream=stream)
    to_mono = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    for packet in file.decode(stream):
        for part in to_mono.resample(packet):
            samples = torch.from_numpy(part.to_ndarray()[0])
            place = round(float(part.pts * part.time_base) * rate) - round(start * rate)
            if place >= len(heard):
                return heard, rate
            kept = samples[max(0, -place) : len(heard) - place]
            begin = max(0, place)
            heard[begin : begin + len(kept)] = kept
    return heard, rate
