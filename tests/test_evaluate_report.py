"""Windows of a real file are the right ones, and the command says what a video is like over its time."""

import numpy
import pytest
import torch
from PIL import Image

from liveavatar_core.errors import InputError
from liveavatar_core.evaluate import __main__ as command
from liveavatar_core.evaluate.footage import length, windows
from liveavatar_core.io.video import VideoWriter
from training.world.looks import draw_look
from training.world.painter import paint
from training.world.pose import Pose, mouth_box

FPS, RATE, SIDE, SECONDS = 25, 16_000, 64, 6


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Frame n has brightness 2 n, and second s of the sound level 0.05 (s + 1)."""
    path = tmp_path_factory.mktemp("stripes") / "video.mp4"
    frames = (torch.arange(4 * FPS) * 2).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, SIDE, SIDE, 3).contiguous()
    tone = torch.sin(torch.arange(4 * RATE) * 0.3) * (0.05 * (1 + torch.arange(4 * RATE) // RATE))
    with VideoWriter(path, width=SIDE, height=SIDE, fps=FPS, sample_rate=RATE, channels=1) as writer:
        writer.write(frames, tone[None])
    return path


def test_a_window_is_where_it_was_asked_for(stripes):
    assert length(stripes) == pytest.approx(4.0, abs=0.05)
    found = list(windows(stripes, (2.0, 0.0, 1.2, 3.9), 0.8))
    assert [window.start for window in found] == [0.0, 1.2, 2.0]  # in order, whole ones only
    for window in found:
        assert window.frames.shape == (20, SIDE, SIDE, 3) and window.fps == FPS and window.rate == RATE
        first = round(window.start * FPS)
        levels = window.frames.float().mean((1, 2, 3))
        torch.testing.assert_close(levels, 2.0 * torch.arange(first, first + 20), rtol=0, atol=2.5)
        loud = window.sound[: RATE // 2].std().item() * 2**0.5
        assert loud == pytest.approx(0.05 * (1 + int(window.start)), rel=0.15)


def test_what_is_no_video_is_refused(tmp_path):
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    with pytest.raises(InputError, match="cannot be read"):
        length(path)


def talking(path, drift: float) -> tuple[torch.Tensor, list[float]]:
    """Somebody drawn opens the mouth whenever there is sound; the colours may drift. Picture and mouth box."""
    look = draw_look(21, "anime")
    generator = numpy.random.default_rng(0)
    said = numpy.repeat(generator.random(SECONDS * 5) > 0.5, 5).astype(numpy.float32)
    rows = Pose.still().rows().repeat(len(said), 1)
    rows[:, 0] = torch.from_numpy(said) * 0.7
    pictures = paint(look, Pose.of(rows), SIDE, SIDE)
    pictures[:, 0] += drift * torch.linspace(0, 1, len(said)).view(-1, 1, 1)
    frames = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    sound = torch.sin(torch.arange(SECONDS * RATE) * 0.3) * torch.from_numpy(said).repeat_interleave(RATE // FPS) * 0.3
    with VideoWriter(path, width=SIDE, height=SIDE, fps=FPS, sample_rate=RATE, channels=1) as writer:
        writer.write(frames, sound[None])
    x, y, a, b = mouth_box(look, Pose.still())[0].tolist()
    box = [(x - a + 1) * SIDE / 2, (y - b + 1) * SIDE / 2, (x + a + 1) * SIDE / 2, (y + b + 1) * SIDE / 2]
    picture = paint(look, Pose.still(), SIDE, SIDE)[0]
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0), box


def table(text: str) -> dict[str, list[float]]:
    """Figures by name, the change last."""
    rows = {}
    for line in text.strip().splitlines()[1:]:
        cells = line.split()
        values = [cell for cell in cells if cell.lstrip("+-").replace(".", "").isdigit()]
        rows[" ".join(cells[: len(cells) - len(values)])] = [float(value) for value in values]
    return rows


@pytest.mark.parametrize("drift", [0.0, 0.15])
def test_the_command_measures_a_file(tmp_path, capsys, drift):
    video, page = tmp_path / "talk.mp4", tmp_path / "report.html"
    picture, box = talking(video, drift)
    Image.fromarray(picture.numpy()).save(tmp_path / "picture.png")
    arguments = [video, "--reference", tmp_path / "picture.png", "--mouth", *box, "--at", 0, 2, 4, "--report", page]
    command.main([str(argument) for argument in arguments])
    rows = table(capsys.readouterr().out)
    assert all(len(values) == 4 for values in rows.values())
    assert min(rows["lips"][:3]) > 0.8 and rows["lips late"][:3] == [0, 0, 0]
    assert min(rows["likeness"][:3]) > 0.9 and rows["growth"][0] == pytest.approx(1, abs=0.01)
    assert rows["flicker"][0] < 1.5
    shifted = rows["colour shift"][-1]
    assert shifted > 10 if drift else abs(shifted) < 3
    text = page.read_text()
    assert text.count("<svg") == len(rows) and text.count("data:image/jpeg") == 4 and "talk.mp4" in text
