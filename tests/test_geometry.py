"""Sizes and counts against the numbers that the specification writes out."""

import pytest

from liveavatar_core.errors import InputError
from liveavatar_core.geometry import (
    FRAMES_PER_BLOCK,
    WINDOW_BLOCKS,
    Geometry,
    blocks_for,
    check_picture,
    fit_size,
    frames_for,
    reference_size,
    sample_at,
)


def test_tokens_at_the_published_size():
    geometry = Geometry(384, 704)
    assert geometry.tokens_per_frame == 1056
    assert geometry.tokens_per_block == 3168
    assert geometry.tokens_per_block * WINDOW_BLOCKS == 12672
    assert geometry.sink_tokens == 2640


@pytest.mark.parametrize(
    ("height", "width", "frame", "sink"),
    [
        (400, 720, 1125, 2778),
        (384, 640, 960, 2400),
        (512, 512, 1024, 2560),
        (256, 384, 384, 960),
        (448, 768, 1344, 3360),
    ],
)
def test_tokens_at_other_sizes(height, width, frame, sink):
    geometry = Geometry(height, width)
    assert (geometry.tokens_per_frame, geometry.sink_tokens) == (frame, sink)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match="height is 390 px; it must be a multiple of 16"):
        Geometry(390, 704)


@pytest.mark.parametrize(
    ("picture", "area", "want"),
    [
        ((400, 720), 720 * 400, (384, 704)),
        ((720, 1280), 720 * 400, (384, 704)),
        ((1024, 1024), 720 * 400, (512, 512)),
        ((1536, 1024), 720 * 400, (640, 448)),
        ((1024, 1536), 704 * 384, (384, 576)),
        ((720, 1280), 688 * 368, (384, 640)),
        ((400, 720), 832 * 480, (448, 768)),
        ((720, 1280), 832 * 480, (448, 832)),
    ],
)
def test_the_originals_size_rule(picture, area, want):
    assert reference_size(*picture, area) == want


@pytest.mark.parametrize("picture", [(100, 80), (720, 1280), (4000, 3000), (333, 777), (64, 320), (2160, 3840)])
@pytest.mark.parametrize("area", [384 * 256, 704 * 384])
def test_fitted_sizes_keep_the_shape_and_the_budget(picture, area):
    rows, columns = fit_size(*picture, area)
    assert rows % 16 == columns % 16 == 0
    assert 0.8 * area <= rows * columns <= area
    assert abs((columns / rows) / (picture[1] / picture[0]) - 1) < 0.13


def test_widescreen_fits_exactly():
    assert fit_size(384, 704, 704 * 384) == (384, 704)


@pytest.mark.parametrize("size", [(1, 1), (63, 500), (100, 2000)])
def test_hopeless_pictures_are_refused(size):
    with pytest.raises(InputError, match=f"the picture is {size[1]}x{size[0]} px; its "):
        check_picture(*size)


@pytest.mark.parametrize(
    ("seconds", "fps", "frames", "blocks"), [(0.1, 25, 3, 1), (1.0, 25, 25, 3), (1.92, 25, 48, 5), (10.0, 16, 160, 14)]
)
def test_frames_and_blocks(seconds, fps, frames, blocks):
    assert frames_for(seconds, fps) == frames
    assert blocks_for(frames) == blocks
    assert blocks * FRAMES_PER_BLOCK - 3 >= frames


def test_sound_never_drifts_from_its_frame():
    for fps, rate in ((25, 16_000), (25, 44_100), (16, 22_050), (24, 48_000)):
        for frame in (0, 1, 11, 12, 100_000, 9_000_000):
            assert abs(sample_at(frame, fps, rate) / rate - frame / fps) <= 0.5 / rate + 1e-9
