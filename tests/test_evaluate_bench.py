"""What spoils a video moves its figure by more than its step, and what does no harm moves none so far."""

from dataclasses import dataclass, replace

import numpy
import pytest
import torch
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from liveavatar_core.evaluate.footage import Window, windows
from liveavatar_core.evaluate.measure import figure, measure
from liveavatar_core.evaluate.places import Places, Reference, at_size
from liveavatar_core.evaluate.speech import agreement, opening
from liveavatar_core.evaluate.tracking import track_mouth
from liveavatar_core.geometry import DEFAULT_FPS, SAMPLE_RATE
from liveavatar_core.io.video import VideoWriter
from training.world.cases import boxes
from training.world.looks import KINDS, Look, draw_look
from training.world.motion import SLOW, perform
from training.world.painter import paint
from training.world.pose import Pose, mouth_box

SIDE, FRAMES = 128, 50
BLINK = round(2.0 / SLOW) - FRAMES // 2  # of the clock: a blink in the middle


def in_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def babble(seed: int) -> numpy.ndarray:
    """(3, n): a mouth that opens three times a second."""
    times = numpy.arange(300) / 100
    strength = numpy.random.default_rng(seed).random(10).repeat(30)
    opened = (0.5 - 0.5 * numpy.cos(times * 2 * numpy.pi * 3.3)) * (0.3 + 0.7 * strength)
    return numpy.stack((opened, 0.3 * strength, 0 * times)).astype(numpy.float32)


def play(look: Look, action: str = "calm", clock: int = 60, seed: int = 0) -> Window:
    """Somebody whose loudness is the opening of the mouth."""
    pose = perform(babble(seed), action, 0, FRAMES, clock)
    level = pose.open.flatten().clamp(min=0).repeat_interleave(SAMPLE_RATE // DEFAULT_FPS)
    sound = 0.3 * level * torch.sin(torch.arange(len(level)) * 0.3)
    return Window(0.0, DEFAULT_FPS, in_bytes(paint(look, pose, SIDE, SIDE)), sound, SAMPLE_RATE)


@dataclass
class Scene:
    look: Look
    reference: Reference
    window: Window
    figures: dict[str, float]


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A character with a hammer, and all boxes."""
    look = next(look for look in (draw_look(seed, "game") for seed in range(99)) if look.prop == "hammer")
    said = boxes(look, SIDE)
    parts = {name: tuple(box) for name, box in said["parts"].items()}
    reference = Reference(in_bytes(paint(look, Pose.still(), SIDE, SIDE))[0], Places(tuple(said["mouth"]), parts))
    window = play(look)
    return Scene(look, reference, window, measure(window, reference).figures)


def changed(scene: Scene, frames: torch.Tensor) -> Window:
    return replace(scene.window, frames=frames.round().clamp(0, 255).to(torch.uint8))


def warped(scene: Scene, across: float = 1.0, down: float = 1.0, waves: float = 0.0) -> Window:
    planes = scene.window.frames.permute(0, 3, 1, 2).float()
    place = affine_grid(torch.tensor([[[1 / across, 0, 0], [0, 1 / down, 0]]]), [1, 3, SIDE, SIDE], align_corners=False)
    place = place + waves * torch.stack((torch.sin(9 * place[..., 1]), torch.cos(8 * place[..., 0])), -1)
    place = place.expand(FRAMES, -1, -1, -1)
    moved = grid_sample(planes, place, mode="bilinear", padding_mode="border", align_corners=False)
    return changed(scene, moved.permute(0, 2, 3, 1))


def swapped(scene: Scene) -> Window:
    other = draw_look(24, "game")
    kept = {name: getattr(scene.look, name) for name in ("background", "prop", "seed", "x", "y", "size")}
    return play(replace(other, **kept))


def late(scene: Scene) -> Window:
    return replace(scene.window, sound=scene.window.sound.roll(-SAMPLE_RATE // 5))


def blurred(scene: Scene) -> Window:
    planes = scene.window.frames.permute(0, 3, 1, 2).float()
    return changed(scene, avg_pool2d(planes, 3, 1, 1, count_include_pad=False).permute(0, 2, 3, 1))


def pushed(scene: Scene) -> Window:
    """The background moves on its own."""
    left, top, right, bottom = (round(edge) for edge in scene.reference.places.parts["background"])
    frames = scene.window.frames.clone()
    frames[:, top:bottom, left:right] = frames[:, top:bottom, left:right].roll((3, 5), (1, 2))
    return replace(scene.window, frames=frames)


def beating(scene: Scene) -> Window:
    beat = torch.tensor([5.0, -5.0]).repeat(FRAMES)[:FRAMES].view(-1, 1, 1, 1)
    return changed(scene, scene.window.frames + beat)


def elsewhere(look: Look) -> Look:
    return replace(look, background="beach" if look.background != "beach" else "city")


SPOILED = {
    "sound 200 ms away": (late, ["lips", "lips late"]),
    "another sound": (lambda scene: replace(scene.window, sound=play(scene.look, seed=7).sound.flip(0)), ["lips"]),
    "another face": (swapped, ["likeness"]),
    "blur": (blurred, ["sharpness", "eyes sharpness", "hair sharpness"]),
    "colours": (lambda s: changed(s, s.window.frames + torch.tensor([14.0, 0, -14])), ["colour shift", "colours"]),
    "too bright": (lambda s: changed(s, s.window.frames * 1.4), ["brightness", "clipped"]),
    "flicker": (beating, ["flicker"]),
    "all grows": (lambda scene: warped(scene, 1.06, 1.06), ["growth", "head growth"]),
    "the head grows": (lambda scene: play(replace(scene.look, size=1.08 * scene.look.size)), ["head growth"]),
    "stretched": (lambda scene: warped(scene, 1.05, 0.95), ["stretch", "head stretch"]),
    "wavy": (lambda scene: warped(scene, waves=0.05), ["distortion", "head distortion"]),
    "no hammer": (lambda scene: play(replace(scene.look, prop="")), ["prop kept"]),
    "another place": (lambda scene: play(elsewhere(scene.look)), ["background kept", "structure"]),
    "the place moves": (pushed, ["background moved"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_spoiled_shows(scene, name):
    spoil, figures = SPOILED[name]
    found = measure(spoil(scene), scene.reference).figures
    moved = {name: abs(found[name] - scene.figures[name]) / figure(name).step for name in figures}
    assert min(moved.values()) > 1, moved


def encoded(scene: Scene, folder) -> Window:
    path = folder / "again.mp4"
    sizes = {"width": SIDE, "height": SIDE, "fps": DEFAULT_FPS, "sample_rate": SAMPLE_RATE, "channels": 1}
    with VideoWriter(path, **sizes) as writer:
        writer.write(scene.window.frames, scene.window.sound[None])
    return next(windows(path, (0.0,), FRAMES / DEFAULT_FPS))


HARMLESS = {
    "encoded": encoded,
    "sways": lambda scene, _: play(scene.look, "talk"),
    "blinks": lambda scene, _: play(scene.look, clock=BLINK),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_does_not(scene, name, tmp_path):
    found = measure(HARMLESS[name](scene, tmp_path), scene.reference).figures
    moved = {name: abs(found[name] - scene.figures[name]) / figure(name).step for name in found}
    assert found.keys() == scene.figures.keys() and max(moved.values()) < 1, moved


@pytest.mark.parametrize("kind", KINDS)
def test_lips_are_read_in_a_head_that_moves(kind):
    """Nods and sway by more than 10 pixels, and light from one side; a box that stays put misses the mouth."""
    look = draw_look(5, kind)
    pose = perform(babble(1), "nod", 0, FRAMES, 40)
    light = torch.linspace(0.7, 1.3, SIDE).view(1, 1, -1, 1)
    frames = (in_bytes(paint(look, pose, SIDE, SIDE)) * light).clamp(0, 255).to(torch.uint8)
    picture = in_bytes(paint(look, Pose.still(), SIDE, SIDE))[0]
    mouth = boxes(look, SIDE)["mouth"]
    found = track_mouth(frames, picture, mouth)
    x, y, _, _ = ((mouth_box(look, pose) + torch.tensor([1.0, 1, 0, 0])) * SIDE / 2).unbind(1)
    away = torch.stack((found[:, 0::2].mean(1) - x, found[:, 1::2].mean(1) - y), 1).norm(dim=1)
    assert y.max() - y.min() > 10 and away.mean() < 1.5 and away.max() < 4
    said, box = pose.open.flatten(), torch.tensor(mouth)
    read, stuck = (agreement(opening(frames, b, picture, box), said).correlation for b in (found, box[None]))
    assert read > 0.9 and stuck < read


def test_boxes_go_where_the_picture_goes():
    """A wide picture in a square video is cut left and right."""
    picture = torch.zeros(100, 200, 3)
    picture[40:60, 90:120] = 1
    reference = at_size(picture, Places((90, 40, 120, 60)), 64, 64)
    left, top, right, bottom = (round(edge) for edge in reference.places.mouth)
    assert reference.picture[top + 1 : bottom - 1, left + 1 : right - 1].min() > 250
    outside = reference.picture.clone()
    outside[top - 1 : bottom + 1, left - 1 : right + 1] = 0
    assert outside.max() < 5
