"""The file plays at any moment, ends as an ordinary mp4, and sound stays with its picture."""

import logging
import shutil

import av
import numpy
import pytest
import torch

from liveavatar_core.errors import OutputError
from liveavatar_core.geometry import sample_at
from liveavatar_core.io import video
from liveavatar_core.io.video import VideoWriter

HEIGHT, WIDTH = 96, 64
BLOCKS = (9, 12, 12, 12)
FLASH = 26  # frame that is white, with a click in its sound


class Played:
    """What a player gets out of a file."""

    def __init__(self, path):
        with av.open(str(path)) as file:
            self.names = sorted(stream.codec_context.name for stream in file.streams)
            self.counts = [stream.frames for stream in file.streams]
            picture = file.streams.video[0]
            self.rate, self.pixels = picture.average_rate, picture.codec_context.pix_fmt
            self.lengths = [float(stream.duration * stream.time_base) for stream in file.streams]
            frames = list(decode_all(file))
        self.times = [float(frame.pts * frame.time_base) for frame in frames]
        self.frames = numpy.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        if len(self.names) == 2:
            with av.open(str(path)) as file:
                parts = list(file.decode(audio=0))
            self.sample_rate = parts[0].sample_rate
            self.sound_start = float(parts[0].pts * parts[0].time_base)
            self.sound = numpy.concatenate([part.to_ndarray() for part in parts], 1)

    @property
    def flash(self):
        (frame,) = (self.frames.mean((1, 2, 3)) > 128).nonzero()[0]
        return self.times[frame]

    @property
    def click(self):
        return (numpy.abs(self.sound[0]) > 0.3).argmax() / self.sample_rate + self.sound_start


def decode_all(file):
    """Frames until the first packet that was torn."""
    try:
        yield from file.decode(video=0)
    except av.error.InvalidDataError:
        return


def write_blocks(writer, fps, rate, channels, *, after=lambda frames: None):
    first = 0
    for count in BLOCKS:
        frames = torch.zeros(count, HEIGHT, WIDTH, 3, dtype=torch.uint8)
        start, end = sample_at(first, fps, rate), sample_at(first + count, fps, rate)
        samples = torch.zeros(channels, end - start)
        if first <= FLASH < first + count:
            frames[FLASH - first] = 255
            click = sample_at(FLASH, fps, rate) - start
            samples[:, click : click + rate // 200] = 0.9
        writer.write(frames, samples if channels else None)
        first += count
        after(first)


def open_writer(path, fps=25, rate=16_000, channels=1, watch=None):
    return VideoWriter(path, width=WIDTH, height=HEIGHT, fps=fps, sample_rate=rate, channels=channels, watch=watch)


@pytest.mark.parametrize(
    "fps, rate, channels", [(25, 16_000, 1), (25, 44_100, 2), (16, 48_000, 2), (24, 37_800, 1), (25, 192_000, 6)]
)
def test_finished_file(tmp_path, fps, rate, channels):
    path = tmp_path / "a.mp4"
    with open_writer(path, fps, rate, channels) as writer:
        write_blocks(writer, fps, rate, channels)
    got = Played(path)
    assert got.names == ["aac", "h264"] and got.pixels == "yuv420p"
    assert got.rate == fps and got.counts[0] == len(got.frames) == sum(BLOCKS)
    assert got.frames.shape[1:] == (HEIGHT, WIDTH, 3) and got.sound.shape[0] == min(channels, 2)
    assert got.times == pytest.approx([i / fps for i in range(sum(BLOCKS))], abs=1e-6)
    assert got.lengths == pytest.approx([sum(BLOCKS) / fps] * 2, abs=0.5 / fps)
    assert got.flash == pytest.approx(FLASH / fps, abs=1e-6)
    assert got.click == pytest.approx(FLASH / fps, abs=1e-3)
    data = path.read_bytes()
    assert b"moof" not in data and data.find(b"moov") < data.find(b"mdat")  # not in fragments, index in front
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("channels", [0, 1])
def test_cut_off_at_any_moment(tmp_path, channels):
    path, seen = tmp_path / "a.mp4", []

    def cut(written):
        shutil.copy(path, tmp_path / "cut.mp4")
        got = Played(tmp_path / "cut.mp4")
        assert written - 8 <= len(got.frames) <= written
        if len(got.frames) > FLASH:
            assert got.flash == pytest.approx(FLASH / 25, abs=1e-6)
            assert not channels or got.click == pytest.approx(FLASH / 25, abs=1e-3)
        seen.append(len(got.frames))

    with open_writer(path, channels=channels) as writer:
        write_blocks(writer, 25, 16_000, channels, after=cut)
    assert seen == sorted(seen) and seen[0] > 0

    data = path.read_bytes()  # the last copy, torn in the middle of a fragment, still plays
    growing = (tmp_path / "cut.mp4").read_bytes()
    assert growing != data
    (tmp_path / "torn.mp4").write_bytes(growing[:-10])
    assert len(Played(tmp_path / "torn.mp4").frames) >= seen[-1] - 8


def test_who_watches_gets_the_growing_file(tmp_path):
    path, pieces = tmp_path / "a.mp4", []

    def compare(written):
        assert path.read_bytes() == b"".join(pieces)

    with open_writer(path, watch=pieces.append) as writer:
        write_blocks(writer, 25, 16_000, 1, after=compare)
    (tmp_path / "seen.mp4").write_bytes(b"".join(pieces))
    seen, kept = Played(tmp_path / "seen.mp4"), Played(path)
    assert numpy.array_equal(seen.frames, kept.frames) and seen.times == kept.times
    assert numpy.array_equal(seen.sound, kept.sound) and seen.sound_start == kept.sound_start


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_most_of_the_first_block_can_be_played_at_once(tmp_path, rate):
    """Browsers begin once they have a fifth of a second of both."""
    pieces = []
    with open_writer(tmp_path / "a.mp4", rate=rate, watch=pieces.append) as writer:
        writer.write(torch.zeros(9, HEIGHT, WIDTH, 3, dtype=torch.uint8), torch.zeros(1, sample_at(9, 25, rate)))
        (tmp_path / "begun.mp4").write_bytes(b"".join(pieces))
    with av.open(str(tmp_path / "begun.mp4")) as file:
        ends = {packet.stream.type: packet.pts + packet.duration for packet in file.demux() if packet.pts is not None}
        times = {stream.type: float(ends[stream.type] * stream.time_base) for stream in file.streams}
    assert min(times.values()) >= 0.24


def test_without_sound(tmp_path):
    with open_writer(tmp_path / "a.mp4", channels=0) as writer:
        write_blocks(writer, 25, 16_000, 0)
    got = Played(tmp_path / "a.mp4")
    assert got.names == ["h264"] and got.counts == [sum(BLOCKS)] and got.lengths == [sum(BLOCKS) / 25]


def test_colours_and_sound_survive(tmp_path):
    colours = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [240, 240, 240]], dtype=torch.uint8)
    frames = colours.repeat_interleave(WIDTH // 4, 0).expand(12, HEIGHT, WIDTH, 3)
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(23_040) / 48_000)
    with open_writer(tmp_path / "a.mp4", rate=48_000, channels=2) as writer:
        writer.write(frames, torch.stack([tone, torch.zeros(23_040)]))
    got = Played(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as file:
        frame = next(file.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # tagged BT.709, limited
        seen = frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
    middles = seen[HEIGHT // 2, WIDTH // 8 :: WIDTH // 4].astype(int)
    assert numpy.abs(middles - colours.numpy()).max() <= 6
    left, right = got.sound[:, :23_040]
    assert numpy.abs(left[3_000:18_000] - tone.numpy()[3_000:18_000]).max() < 0.03
    assert numpy.abs(right[3_000:18_000]).max() < 0.03


def test_an_error_keeps_what_was_made(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"), open_writer(tmp_path / "a.mp4") as writer:
        write_blocks(writer, 25, 16_000, 1, after=stop_at(21))
    got = Played(tmp_path / "a.mp4")
    assert len(got.frames) == got.counts[0] == 21 and got.rate == 25


def stop_at(count):
    def after(written):
        if written >= count:
            raise RuntimeError("stopped")

    return after


def test_a_failed_finish_keeps_the_growing_file(tmp_path, monkeypatch, caplog):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_copy_streams", full)
    writer = open_writer(tmp_path / "a.mp4")
    write_blocks(writer, 25, 16_000, 1)
    with pytest.raises(OutputError, match="plays but could not be finished .*No space left"):
        writer.close()
    writer.close()  # nothing more to do
    assert len(Played(tmp_path / "a.mp4").frames) == sum(BLOCKS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="stopped"):  # the first error is reported
        with open_writer(tmp_path / "b.mp4") as writer:
            write_blocks(writer, 25, 16_000, 1, after=stop_at(9))
    assert "could not be finished" in caplog.text


def test_a_full_disk(tmp_path):
    """The file system refuses to go beyond a size, as a full one would."""
    resource = pytest.importorskip("resource")
    noise = torch.randint(0, 256, (12, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written on"), open_writer(tmp_path / "a.mp4") as writer:
            for _ in range(20):
                writer.write(noise, torch.zeros(1, 7_680))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(Played(tmp_path / "a.mp4").frames) > 12


def test_nothing_written_leaves_nothing(tmp_path):
    with open_writer(tmp_path / "a.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    with pytest.raises(OutputError, match="choose another folder"):
        open_writer(tmp_path / "absent" / "a.mp4")
    frames = torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    with open_writer(tmp_path / "a.mp4") as writer:
        with pytest.raises(OutputError, match="takes .n, 96, 64, 3. uint8"):
            writer.write(frames.float())
        with pytest.raises(OutputError, match="takes .n, 96, 64, 3. uint8"):
            writer.write(frames.transpose(1, 2))
        with pytest.raises(OutputError, match="2 channels; .* opened for 1"):
            writer.write(frames, torch.zeros(2, 640))
