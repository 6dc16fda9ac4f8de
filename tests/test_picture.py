"""Pictures fill the frame, the original's bars are reproduced on request, and transparency has one colour."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from liveavatar_core.encoders.picture import cover, picture_warnings, reference_crop
from liveavatar_core.errors import InputError

SHAPES = [(400, 720, 384, 704), (720, 1280, 384, 704), (300, 300, 128, 192), (333, 251, 128, 192), (64, 80, 512, 512),
          (641, 333, 704, 384), (384, 705, 384, 704)]  # fmt: skip


def random_picture(height, width, channels=3):
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("h, w, height, width", SHAPES)
def test_cover_leaves_no_bars(h, w, height, width):
    got = cover(torch.ones(h, w, 3), height, width)
    assert got.shape == (3, height, width) and got.dtype == torch.float32
    assert got.min() > 0.999
    assert cover(random_picture(h, w), height, width).abs().max() <= 1


def test_cover_keeps_the_shape_and_the_centre():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 300), torch.linspace(-1, 1, 600), indexing="ij")
    picture = torch.stack([(x + 1) / 2, (y + 1) / 2, ((x**2 * 4 + y**2) < 0.25).float()], -1)
    got = cover(picture, 128, 128)  # the middle third of the width is seen
    assert got[0].mean().abs() < 1e-3 and got[1].mean().abs() < 1e-3
    assert got[0].min() == pytest.approx(-0.5, abs=0.01) and got[1].max() == pytest.approx(1, abs=0.01)
    disc = got[2] > 0
    assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 1  # still round


def test_cover_is_antialiased():
    lines = torch.zeros(512, 512, 3)
    lines[:, ::4] = 1  # a quarter of the light, wherever the scaled picture's points fall
    assert (cover(lines, 128, 128)[:, :, 2:-2] + 0.5).abs().max() < 0.05


def test_same_size_changes_nothing():
    picture = random_picture(128, 192)
    for prepare in (cover, reference_crop):
        got = prepare(picture, 128, 192)
        assert (got - (picture.permute(2, 0, 1) * 2 - 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    "h, w, left, right",
    [(400, 720, 6, 7), (720, 1280, 11, 11)],  # at 704x384, as the original was seen to do
)
def test_reference_crop_has_the_originals_bars(h, w, left, right):
    black = (reference_crop(torch.ones(h, w, 3), 384, 704) == -1).all(0)
    assert black[:, :left].all() and black[:, -right:].all() and not black[:, left:-right].any()


@pytest.mark.parametrize("h, w, height, width", SHAPES)
def test_reference_crop_is_the_originals_operation(h, w, height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    picture = random_picture(h, w)
    original = transforms.Compose([
        transforms.ToPILImage(),
        transforms.Resize(min(height, width)),
        transforms.CenterCrop((height, width)),
        transforms.ToTensor(),
    ])  # fmt: skip
    want = original((picture * 255).round().to(torch.uint8).permute(2, 0, 1)) * 2 - 1
    torch.testing.assert_close(reference_crop(picture, height, width), want, rtol=0, atol=1e-6)


def test_transparency_becomes_grey():
    picture = torch.ones(128, 128, 4)
    picture[:, :64, 3] = 0
    for prepare in (cover, reference_crop):
        got = prepare(picture, 128, 128)
        assert got[:, :, :63].abs().max() < 0.01 and got[:, :, 65:].min() > 0.99


def face(height, width, channels=3):
    """Two brightnesses with a sharp edge between them, as hair and skin have."""
    picture = torch.full((height, width, channels), 0.2)
    picture[height // 4 :, width // 3 :, :3] = 0.8
    if channels == 4:
        picture[..., 3] = 1
    return picture


def blurred(picture, radius):
    return avg_pool2d(picture.permute(2, 0, 1), 2 * radius + 1, stride=1).permute(1, 2, 0)


def test_a_good_picture_is_taken_without_a_word():
    for picture in (
        face(512, 512),
        face(512, 512, 4),
        face(2000, 1000),
        random_picture(300, 400),
        blurred(face(512, 512), 2),
    ):
        assert picture_warnings(picture) == []


@pytest.mark.parametrize(
    "picture, word",
    [
        (face(255, 300), "larger"),
        (face(300, 901), "long"),
        (face(512, 512, 4) * torch.tensor([1, 1, 1, 0.9]), "transparent"),
        (face(512, 512) * 0.1, "dark"),
        (face(512, 512) * 1.3, "white"),
        (torch.full((512, 512, 3), 0.5), "nothing to see"),
        (blurred(face(512, 512), 20), "blurred"),
    ],
)
def test_a_picture_that_may_disappoint_is_commented_once(picture, word):
    (warning,) = picture_warnings(picture)
    assert word in warning


@pytest.mark.parametrize(
    "picture, words",
    [
        (torch.ones(63, 100, 3), "at least 64 px"),
        (torch.ones(100, 600, 3), "at most 5 times"),
        (torch.ones(100, 100, 1), "3 or 4 channels"),
        (torch.ones(1, 100, 100, 3), "shape is"),
        (torch.full((100, 100, 3), float("nan")), "not finite"),
    ],
)
def test_refusals(picture, words):
    for prepare in (cover, reference_crop):
        with pytest.raises(InputError, match=words):
            prepare(picture, 128, 128)
