"""A video file that can be watched while it is being made.

Owns encoding and the file's two lives: fragmented while it grows, so that it plays however it is cut off, and an
ordinary mp4 once closed, for readers that ask a file for its frame rate and length. The growing file's bytes can be
handed to somebody else as well, who shows them meanwhile. Does not know where frames come from or how sound is cut to
them.
"""

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy
import torch
from torch import Tensor

from liveavatar_core.errors import OutputError

log = logging.getLogger(__name__)

# A fragment every 0.04 s reaches the file at once. (FFmpeg's fragment per packet gives sound wrong times.) The header
# waits for the first packets, because only they tell how much of AAC's start-up must be skipped.
GROWING = {
    "movflags": "empty_moov+delay_moov+default_base_moof",
    "frag_duration": "40000",
    "flush_packets": "1",
}
FINISHED = {"movflags": "faststart"}
# No look-ahead and no reordering, so that after a write no more than a few frames are still on their way to the file.
PICTURE_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "17"}
SOUND_BITS = 192_000
# AAC's rates at which its packets of 1024 samples are short. The last two of a write wait for the next: at 16 kHz they
# would be a third of the first block, and a browser would not begin before the second.
SOUND_RATES = (32_000, 44_100, 48_000, 64_000, 88_200, 96_000)
OTHER_RATE = 48_000
BT709, LIMITED = 1, 1  # as players assume for video without a tag; FFmpeg's numbers


class VideoWriter:
    """H.264 and AAC at `path`. `fps` frames and `sample_rate` samples per second; 0 channels for no sound.

    Frames and samples are placed by their count alone, so picture and sound cannot drift. Use as a context manager:
    leaving it closes the file, after an error too. Raises OutputError where the file cannot be written.

    `watch` is called with every piece of the growing file, in order: fragmented mp4 from its first byte on.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: int | Fraction,
        sample_rate: int = 0,
        channels: int = 0,
        watch: Callable[[bytes], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.frames = self.samples = 0  # written so far
        self._shape, self._frame_time = (height, width, 3), 1 / Fraction(fps)
        self._channels, self._sample_rate = channels, sample_rate
        try:
            self._file = av.open(_Growing(self.path, watch), "w", format="mp4", options=GROWING)
            self._picture = self._file.add_stream("libx264", rate=fps, options=PICTURE_OPTIONS)
            self._sound = self._add_sound() if channels else None
        except (av.FFmpegError, OSError, ValueError) as error:
            raise OutputError(f"{self.path} cannot be made a video ({error}); choose another folder") from error
        self._picture.width, self._picture.height, self._picture.pix_fmt = width, height, "yuv420p"
        context = self._picture.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709

    def _add_sound(self) -> av.AudioStream:
        rate = self._sample_rate if self._sample_rate in SOUND_RATES else OTHER_RATE
        stream = self._file.add_stream("aac", rate=rate, layout="mono" if self._channels == 1 else "stereo")
        stream.bit_rate = SOUND_BITS
        return stream

    def write(self, frames: Tensor, samples: Tensor | None = None) -> None:
        """Append frames (n, H, W, 3) uint8 and samples (channels, m) float32; more than two channels are mixed."""
        if tuple(frames.shape[1:]) != self._shape or frames.dtype != torch.uint8:
            height, width, _ = self._shape
            raise OutputError(
                f"frames are {tuple(frames.shape)} {frames.dtype}; {self.path} takes (n, {height}, {width}, 3) uint8"
            )
        given = 0 if samples is None else len(samples)
        if given not in (0, self._channels):
            raise OutputError(f"the sound has {given} channels; {self.path} was opened for {self._channels}")
        try:
            if given:
                self._write_sound(samples)
            for pixels in frames.cpu().numpy():
                self._write_picture(pixels)
        except (av.FFmpegError, OSError) as error:
            raise OutputError(
                f"{self.path} cannot be written on ({error}); what was made until frame {self.frames} is kept: free "
                "space or choose another disk"
            ) from error

    def _write_picture(self, pixels: numpy.ndarray) -> None:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
        frame.pts, frame.time_base = self.frames, self._frame_time
        self._file.mux(self._picture.encode(frame))
        self.frames += 1

    def _write_sound(self, samples: Tensor) -> None:
        sound = samples.detach().float().cpu()
        if len(sound) > 2:
            sound = sound.mean(0, keepdim=True).expand(2, -1)
        if not sound.shape[1]:
            return
        layout = "mono" if len(sound) == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(numpy.ascontiguousarray(sound.numpy()), format="fltp", layout=layout)
        frame.sample_rate = self._sample_rate
        frame.pts, frame.time_base = self.samples, Fraction(1, self._sample_rate)
        self._file.mux(self._sound.encode(frame))
        self.samples += sound.shape[1]

    def close(self) -> None:
        """Finish the file and replace it by an ordinary mp4 in one step. May be called again.

        A file without frames is removed. If the ordinary mp4 cannot be made the growing one stays, complete, and
        OutputError says so.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        finished = self.path.with_name(f".{self.path.name}.finishing")
        try:
            with file:
                if self.frames:
                    for stream in file.streams:
                        file.mux(stream.encode(None))
            if self.frames:
                _copy_streams(self.path, finished)
                finished.replace(self.path)
            else:
                self.path.unlink(missing_ok=True)
        except (av.FFmpegError, OSError) as error:
            raise OutputError(
                f"{self.path} plays but could not be finished as an ordinary mp4 ({error}); free as much space as it "
                "takes and convert it"
            ) from error
        finally:
            finished.unlink(missing_ok=True)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OutputError as second:
            if error is None:
                raise
            log.warning("%s", second)  # the first error is the one to report


class _Growing:
    """What PyAV writes the growing file to. It cannot seek, so what is written stays as it is; PyAV closes it."""

    def __init__(self, path: Path, watch: Callable[[bytes], None] | None) -> None:
        self._file, self._watch = path.open("wb"), watch

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        if self._watch is not None:
            self._watch(data)

    def close(self) -> None:
        self._file.close()


def _copy_streams(source: Path, target: Path) -> None:
    """Write the packets of `source` into an ordinary mp4 with its index in front."""
    with av.open(str(source)) as growing, av.open(str(target), "w", format="mp4", options=FINISHED) as finished:
        copies = {stream.index: finished.add_stream_from_template(stream) for stream in growing.streams}
        for packet in growing.demux():
            if packet.dts is not None:  # demuxing ends with an empty packet per stream
                packet.stream = copies[packet.stream.index]
                finished.mux(packet)
