"""Windows of a file are the right ones; what a set is made of; and reports say what is in the figures."""

import json

import numpy
import pytest
import torch
from PIL import Image

from launch import ROOT
from liveavatar_core.client.workflow import find, read
from liveavatar_core.errors import InputError
from liveavatar_core.evaluate import __main__ as command
from liveavatar_core.evaluate.cases import cases
from liveavatar_core.evaluate.footage import length, windows
from liveavatar_core.evaluate.measure import Moment
from liveavatar_core.evaluate.places import Places, Reference, places_beside
from liveavatar_core.evaluate.report import Film, as_page, as_text, differences
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
        assert window.frames.shape == (20, SIDE, SIDE, 3) and window.fps == FPS
        first = round(window.start * FPS)
        levels = window.frames.float().mean((1, 2, 3))
        torch.testing.assert_close(levels, 2.0 * torch.arange(first, first + 20), rtol=0, atol=2.5)
        loud = window.sound[: window.rate // 2].std().item() * 2**0.5
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


@pytest.mark.parametrize("drift", [0.0, 0.15])
def test_the_command_measures_a_file(tmp_path, capsys, drift):
    video, page, lines = (tmp_path / name for name in ("talk.mp4", "report.html", "figures.jsonl"))
    picture, box = talking(video, drift)
    Image.fromarray(picture.numpy()).save(tmp_path / "picture.png")
    (tmp_path / "picture.json").write_text(json.dumps({"parts": {"hair": [10, 0, 54, 30]}}))
    arguments = ["video", video, "--reference", tmp_path / "picture.png", "--mouth", *box, "--at", 0, 2, 4]
    command.main([str(argument) for argument in (*arguments, "--report", page, "--figures", lines)])
    said = capsys.readouterr().out
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["start"] for line in found] == [0, 2, 4] and {line["video"] for line in found} == {"talk.mp4"}
    first, *_, last = (line["figures"] for line in found)
    for figures in (first, last):
        assert figures["lips"] > 0.8 and figures["lips late"] == 0 and figures["likeness"] > 0.9
        assert figures["growth"] == pytest.approx(1, abs=0.02) and figures["hair sharpness"] > 0.8
    shifted = last["colour shift"] - first["colour shift"]
    assert shifted > 10 if drift else abs(shifted) < 3
    assert ("colour shift goes from" in said) == bool(drift)
    assert all(any(name in line for line in said.splitlines()) for name in first)
    text = page.read_text()
    assert text.count("<svg") == len(first) and text.count("data:image/jpeg") == 4 and "talk.mp4" in text


def test_without_a_mouth_lips_are_not_measured_and_it_is_said(tmp_path, capsys):
    video = tmp_path / "talk.mp4"
    picture, _ = talking(video, 0)
    Image.fromarray(picture.numpy()).save(tmp_path / "picture.png")
    command.main(["video", str(video), "--reference", str(tmp_path / "picture.png"), "--at", "0"])
    said = capsys.readouterr()
    assert "lips" not in said.out and "picture.json" in said.err and "--mouth" in said.err


@pytest.mark.parametrize(
    "said, reason",
    [
        ("[]", "is not"),
        ('{"mouth": [1, 2, 3]}', "four numbers"),
        ('{"mouth": [9, 2, 3, 8]}', "four numbers"),
        ('{"parts": {"nose": [1, 2, 3, 4]}}', "'nose'; there are head"),
    ],
)
def test_boxes_that_are_none_are_refused(tmp_path, said, reason):
    (tmp_path / "face.json").write_text(said)
    with pytest.raises(InputError, match=reason):
        places_beside(tmp_path / "face.png")


@pytest.fixture
def material(tmp_path):
    """Two classes, a sound, and a workflow that somebody else runs."""
    for kind in ("elf", "robot"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        Image.new("RGB", (64, 64), "grey").save(tmp_path / "pictures" / kind / "a face.png")
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "hello.wav").write_bytes(b"RIFF")
    (tmp_path / "prompts.txt").write_text("Somebody talks, warm light\n\nelf: An elf sings, moonlight\n")
    return tmp_path


def planned(material, ablation=None):
    workflow = read(ROOT / "workflows" / "api" / "demo.json")
    folders = (material / name for name in ("pictures", "sounds", "prompts.txt", "out"))
    return cases(workflow, *folders, ablation)


def test_a_set_is_everything_with_everything(material):
    found = planned(material)
    assert [(case.kind, case.prompt) for case in found] == [
        ("elf", "Somebody talks, warm light"),
        ("elf", "An elf sings, moonlight"),
        ("robot", "Somebody talks, warm light"),
    ]
    assert len({case.video for case in found}) == 3 and [case.video for case in planned(material)] == [
        case.video for case in found
    ]
    (material / "sounds" / "hello.wav").write_bytes(b"RIFF other")
    assert not {case.video for case in found} & {case.video for case in planned(material)}


@pytest.mark.parametrize(
    "ablation, node, name, values",
    [
        ("prompt", "PromptConditioner", "text", ["Somebody talks", "Somebody talks, warm light"]),
        ("size", "ImageLoader", "size", ["384*256", "688*368", "704*384"]),
        ("steps", "Sampler", "steps", [3, 4, 5]),
    ],
)
def test_ablations_change_one_thing(material, ablation, node, name, values):
    found = [case for case in planned(material, ablation) if case.kind == "robot"]
    assert [case.workflow[find(case.workflow, node)[0]]["inputs"][name] for case in found] == values
    assert len({case.variant for case in found}) == len(found)
    loader = found[0].workflow[find(found[0].workflow, "ImageLoader")[0]]["inputs"]
    assert (loader["width"] == 0) == (ablation == "size")


def test_differences_are_named_and_pictures_stand_side_by_side():
    """Two classes, two variants; the elf blurs with time, and talks better when told more."""
    picture = torch.zeros(40, 40, 3, dtype=torch.uint8)

    def film(kind: str, variant: str, lips: float, *sharpness: float) -> Film:
        moments = [Moment(10.0 * i, {"lips": lips, "sharpness": value}, picture) for i, value in enumerate(sharpness)]
        return Film(f"{kind} {variant}", Reference(picture, Places()), moments, kind, variant, {"prompt": "<b>hi</b>"})

    films = [
        film("elf", "bare", 0.2, 1.0, 0.9, 0.6),
        film("elf", "detailed", 0.7, 1.0, 1.0, 0.98),
        film("robot", "bare", 0.5, 1.0, 1.0),
        film("robot", "detailed", 0.55, 1.0, 1.0),
    ]
    named = differences(films)
    assert named[0] == "elf bare: sharpness goes from 1 to 0.6 in 20 s"
    assert named[1] == "elf: lips is 0.7 with detailed, 0.2 with bare"
    assert not any("robot" in text for text in named)
    page = as_page("set", films)
    assert page.count("<polyline") == 8 and page.count("<svg") == 4 and page.count("data:image/jpeg") == 14
    assert "<b>hi" not in page and named[0] in page
    assert "elf" in as_text(films) and "-0.400" in as_text(films)
