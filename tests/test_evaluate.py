"""Every figure falls on an input spoiled in its way, and hardly moves on one that is not. The truth is drawn."""

from dataclasses import replace

import numpy
import pytest
import torch
from torch.nn.functional import avg_pool2d

from liveavatar_core.evaluate.pictures import (
    colour_shift,
    exposure,
    flicker,
    histogram_overlap,
    likeness,
    sharpness,
    structure,
)
from liveavatar_core.evaluate.speech import agreement, loudness, mouths, opening
from training.world.looks import KINDS, draw_look
from training.world.motion import perform
from training.world.painter import paint
from training.world.pose import Pose, mouth_box

SIDE, FRAMES = 96, 75


def in_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def in_pixels(boxes: torch.Tensor) -> torch.Tensor:
    x, y, a, b = ((boxes + torch.tensor([1.0, 1, 0, 0])) * SIDE / 2).unbind(1)
    return torch.stack((x - a, y - b, x + a, y + b), 1)


class Clip:
    """Three seconds of one face, babbling."""

    def __init__(self, kind: str) -> None:
        generator = numpy.random.default_rng(KINDS.index(kind))
        knots = generator.random((3, 40)).repeat(8, 1) * [[1.0], [0.6], [0.4]]
        knots[:, 100:140] = 0  # a pause
        mouth = numpy.stack([numpy.convolve(row, numpy.ones(6) / 6, "same") for row in knots]).astype(numpy.float32)
        self.look = draw_look(21, kind)
        self.other = draw_look(22, kind)
        self.pose = perform(mouth, "talk", 0, FRAMES, 0)
        self.said = self.pose.open.flatten()
        self.frames = in_bytes(paint(self.look, self.pose, SIDE, SIDE))
        self.picture = in_bytes(paint(self.look, Pose.still(), SIDE, SIDE))[0]
        self.boxes = in_pixels(mouth_box(self.look, self.pose))
        self.closed_box = in_pixels(mouth_box(self.look, Pose.still()))[0]

    def opening(self, frames: torch.Tensor) -> torch.Tensor:
        return opening(frames, self.boxes, self.picture, self.closed_box)


@pytest.fixture(scope="module", params=KINDS)
def clip(request) -> Clip:
    return Clip(request.param)


def grain(frames: torch.Tensor) -> torch.Tensor:
    """What a good video codec does, about."""
    generator = torch.Generator().manual_seed(0)
    return (frames + 2.0 * torch.randn(frames.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)


def blurred(frames: torch.Tensor) -> torch.Tensor:
    planes = avg_pool2d(frames.permute(0, 3, 1, 2).float(), 3, 1, 1, count_include_pad=False)
    return planes.round().to(torch.uint8).permute(0, 2, 3, 1)


def test_lips_agree_with_what_was_said(clip):
    for frames in (clip.frames, grain(clip.frames)):
        sync = agreement(clip.opening(frames), clip.said)
        assert sync.correlation > 0.9 and sync.lag == 0
    brighter = (clip.frames.float() * 1.12).clamp(0, 255).to(torch.uint8)
    assert agreement(clip.opening(brighter), clip.said).correlation > 0.85


def test_lips_that_are_late_or_of_another_sound_are_found(clip):
    late = clip.opening(clip.frames.roll(5, 0))  # 200 ms; the face does not move so much that its box is lost
    sync = agreement(late, clip.said)
    assert sync.lag == 5 and sync.correlation < 0.5 and sync.best > 0.75
    shuffled = clip.said[torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))]
    assert abs(agreement(clip.opening(clip.frames), shuffled).correlation) < 0.3
    closed = clip.picture.expand(FRAMES, -1, -1, -1)
    still = opening(closed, clip.closed_box[None], clip.picture, clip.closed_box)
    assert still.max() < 1e-3 and agreement(still, clip.said).correlation == 0


def test_a_pause_is_closed(clip):
    seen = clip.opening(clip.frames)
    assert seen[clip.said < 0.01].mean() < 0.35 * seen[clip.said > 0.4].mean()


def test_a_likeness_is_lost_with_the_face(clip):
    same, swapped = likeness(clip.frames, clip.picture), clip.frames.clone()
    other = in_bytes(paint(replace(clip.other, background=clip.look.background), clip.pose, SIDE, SIDE))
    swapped[:] = other
    assert same.min() > 0.93 and (likeness(swapped, clip.picture) < same - 0.03).all()
    assert (likeness(grain(clip.frames), clip.picture) - same).abs().max() < 0.03
    overlap = histogram_overlap(clip.frames, clip.picture)
    assert overlap.min() > 0.9 and histogram_overlap(swapped, clip.picture).max() < overlap.min() - 0.03


def test_structure_counts_only_where_it_is_told(clip):
    where = torch.ones(SIDE, SIDE, dtype=torch.bool)
    left, top, right, bottom = clip.closed_box.round().int().tolist()
    where[top:bottom, left:right] = False
    hurt = clip.picture.clone()
    hurt[top:bottom, left:right] = 0
    still = clip.picture[None]
    assert structure(still, clip.picture).item() == pytest.approx(1, abs=1e-4)
    assert structure(hurt[None], clip.picture).item() < 0.97
    assert structure(hurt[None], clip.picture, where).item() == pytest.approx(1, abs=1e-4)
    assert structure(blurred(still), clip.picture, where).item() < 0.97


def test_blur_costs_sharpness_and_grain_does_not(clip):
    sharp = sharpness(clip.frames, clip.picture).mean()
    assert 0.9 < sharp < 1.1 and abs(sharpness(grain(clip.frames), clip.picture).mean() - sharp) < 0.06
    assert sharpness(blurred(clip.frames), clip.picture).mean() < 0.75 * sharp


def test_flicker_is_not_motion(clip):
    calm = flicker(clip.frames)
    beat = torch.tensor([6.0, -6.0]).repeat(FRAMES)[:FRAMES].view(-1, 1, 1, 1)
    shaken = (clip.frames.float() + beat).clamp(0, 255).to(torch.uint8)
    assert calm < 1 and flicker(shaken) > calm + 10
    with pytest.raises(ValueError, match="2 frames"):
        flicker(clip.frames[:2])


def test_drifting_colours_and_light_show(clip):
    shift = torch.linspace(0, 1, FRAMES).view(-1, 1, 1, 1) * torch.tensor([20.0, 0, -20])
    drifting = (clip.frames.float() + shift).clamp(0, 255).to(torch.uint8)
    steady, drift = colour_shift(clip.frames, clip.picture), colour_shift(drifting, clip.picture)
    assert steady.max() < 5 and drift[-1] > 15 and drift[-1] > drift[FRAMES // 2] > drift[0]
    mean, ends = exposure(clip.frames)
    bright_mean, bright_ends = exposure((clip.frames.float() * 1.6).clamp(0, 255).to(torch.uint8))
    assert (bright_mean > mean + 0.08).all() and (bright_ends > ends + 0.01).all()
    assert (exposure(grain(clip.frames))[0] - mean).abs().max() < 0.01


def test_loudness_follows_the_sound_and_frames_keep_time():
    rate, fps = 16_000, 25
    samples = torch.zeros(rate)
    samples[6_400:9_600] = 0.5 * torch.sin(torch.arange(3_200) * 0.3)  # frames 10 to 14
    level = loudness(samples, rate, 30, fps)
    assert (level > level.max() / 2).nonzero().flatten().tolist() == [10, 11, 12, 13, 14] and len(level) == 30
    hiss = torch.randn(rate, generator=torch.Generator().manual_seed(0)) * 0.03
    assert torch.corrcoef(torch.stack((level, loudness(samples + hiss, rate, 30, fps))))[0, 1] > 0.95
    with pytest.raises(ValueError, match="as many"):
        agreement(level, level[:-1])


def test_a_box_is_cut_out_where_it_lies():
    frames = torch.zeros(2, 40, 60, 3, dtype=torch.uint8)
    frames[0, 10:20, 30:50] = 255
    cut = mouths(frames, torch.tensor([[30.0, 10.0, 50.0, 20.0]]))
    assert cut[0].min() > 0.49 and cut[0, :, 1:-1, 1:-1].min() > 0.99 and cut[1].max() == 0
