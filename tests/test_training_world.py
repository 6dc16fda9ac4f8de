"""The drawn world: what a seed gives, what moves, and that the truth about mouths is where it is said to be."""

import math
from dataclasses import replace

import numpy
import pytest
import torch

from liveavatar_core.geometry import FRAMES_PER_LATENT
from liveavatar_core.model.rope import grid_factors
from training.world import painter
from training.world.light import turned
from training.world.looks import BACKGROUNDS, GRADES, KINDS, LIGHTS, draw_look, is_held_out
from training.world.motion import HEAD_DIM, QUICK, SLOW, perform
from training.world.painter import paint
from training.world.pose import Pose, eyes_box, mouth_box
from training.world.shapes import cover, ellipse, grid

SIDE = 64


def inside(box: torch.Tensor) -> torch.Tensor:
    """(SIDE, SIDE), true where a row of `mouth_box` says."""
    x, y = (axis[0, 0] for axis in grid(SIDE, SIDE, "cpu"))
    cx, cy, a, b = box
    return ((x - cx).abs() <= a) & ((y - cy).abs() <= b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_picture(kind):
    first, again, other = (paint(draw_look(seed, kind), Pose.still(), SIDE, SIDE) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 3, SIDE, SIDE) and first.min() >= 0 and first.max() <= 1 and first.std() > 0.05


def test_held_out_looks_are_never_trained_on():
    for kind in KINDS:
        assert not any(is_held_out(draw_look(seed, kind)) for seed in range(40))
        assert all(is_held_out(draw_look(seed, kind, held_out=True)) for seed in range(40))


@pytest.mark.parametrize("kind", KINDS)
def test_lips_and_lids_change_the_picture_where_their_boxes_are(kind):
    for seed in range(4):
        look = replace(draw_look(seed, kind), beard=0.0)
        rest = paint(look, Pose.still(), SIDE, SIDE)
        for moved, place in (({"open": 0.5, "wide": 0.6}, mouth_box), ({"blink": 1.0}, eyes_box)):
            pose = Pose.still(**moved)
            change = (paint(look, pose, SIDE, SIDE) - rest)[0].abs().sum(0)
            within = inside(place(look, pose)[0])
            # an opening mouth lets the chin fall too
            assert change[within].mean() > 4 * change[~within].mean(), (kind, seed, moved)
            assert change.max() == change[within].max() > 0.3


def test_every_kind_of_mouth_looks_different():
    shapes = ({}, {"open": 1.0}, {"open": 0.5, "wide": 1.0}, {"open": 0.5, "round": 1.0})
    poses = Pose.of(torch.cat([Pose.still(**shape).rows() for shape in shapes]))
    for kind in KINDS:
        look = replace(draw_look(3, kind), beard=0.0)
        box = inside(mouth_box(look, Pose.still())[0])
        mouths = paint(look, poses, SIDE, SIDE)[:, :, box].flatten(1)
        assert torch.pdist(mouths).min() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_painting_only_near_a_part_loses_nothing(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        rows = torch.rand(3, 9, generator=generator) * 2 - 1
        rows[:, [0, 2, 3, 4]] = rows[:, [0, 2, 3, 4]].abs()
        rows[:, 8] *= 0.05
        look, pose = draw_look(seed, kind), Pose.of(rows)
        near = paint(look, pose, SIDE, SIDE)
        with monkeypatch.context() as everywhere:
            everywhere.setattr(painter, "_REACH", 9.0)
            # soft spots have no end; what is cut off is far below one step of 8 bits
            torch.testing.assert_close(near, paint(look, pose, SIDE, SIDE), rtol=0, atol=1e-3)


def test_light_grade_and_background_change_what_they_should():
    look = replace(draw_look(5, "portrait"), background="studio")
    plain = paint(look, Pose.still(), SIDE, SIDE)

    def changed(**how: str) -> torch.Tensor:
        return paint(replace(look, **how), Pose.still(), SIDE, SIDE)

    means = {name: changed(light=name)[0].mean((1, 2)) for name in LIGHTS}
    warmth = {name: (red / blue).item() for name, (red, _, blue) in means.items()}
    assert min(warmth["candle"], warmth["warm"], warmth["golden"]) > warmth["neutral"] > warmth["daylight"]
    film = changed(grade="film")
    assert film.std(dim=1).max() < 1e-5 < plain.std(dim=1).max()
    face = inside(torch.tensor([look.x, look.y, 0.15, 0.2]))
    for background in BACKGROUNDS[1:]:
        difference = (changed(background=background) - plain)[0].abs().sum(0)
        assert difference[face].max() < 1e-6 < difference.max()
    assert len(GRADES) == 5


def test_shapes_are_antialiased_at_any_thickness():
    x, y = grid(400, 400, "cpu")
    for a, b in ((0.5, 0.5), (0.6, 0.05), (0.1, 0.7)):
        area = cover(ellipse(x, y, a, b), 2 / 400).sum() * (2 / 400) ** 2
        assert area.item() == pytest.approx(numpy.pi * a * b, rel=0.01)


def test_a_performance_depends_on_its_own_frames_alone():
    mouth = numpy.random.default_rng(0).random((3, 1000), numpy.float32)
    whole = perform(mouth, "talk", 0, 200, 48).rows()
    assert torch.equal(perform(mouth, "talk", 60, 40, 108).rows(), whole[60:100])
    calm, lively = (perform(mouth, action, 0, 200, 0).rows() for action in ("calm", "lively"))
    assert torch.equal(calm[:, :3], lively[:, :3])  # lips say the same
    assert calm[:, 6].abs().max() < lively[:, 6].abs().max()
    blinks = perform(mouth, "talk", 0, 600, 0).blink.flatten() > 0.5
    assert blinks.diff().sum() == 10  # five blinks begin and end in 24 s


def test_the_clock_can_be_read_off_rotary_positions():
    latents = tuple(range(0, 5000, 7))
    factors = grid_factors(latents, [0], [0], HEAD_DIM, True)  # (n, pairs, cos and sin)
    for pair, rate in ((1, QUICK), (2, SLOW)):
        angles = torch.tensor([latent * FRAMES_PER_LATENT * rate for latent in latents], dtype=torch.float64)
        torch.testing.assert_close(factors[:, pair, 1].double(), angles.sin(), rtol=0, atol=1e-3)


def test_hues_turn_and_greys_stay():
    colours = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned(colours, 2 * math.pi / 3), colours.roll(1, 1))
    greys = colours[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(turned(greys, 1.0), greys)
