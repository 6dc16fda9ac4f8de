"""The judge's tools: films of any demo model, excerpts of long ones, and what a prompt changed."""

import numpy
import pytest
import torch

from liveavatar_core.demo.random_model import write_demo
from liveavatar_core.evaluate.measure import SECONDS
from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_DROPPED, FRAMES_PER_BLOCK, blocks_for
from training.judge.lines import WISHES, above, below, blocks_at, came, with_wish
from training.judge.role import JUDGED_AT, Role, Take, plain_role
from training.speaker import Speaker
from training.speech.sounds import music
from training.world.looks import KINDS

SIDE, BLOCKS = 64, 5


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Speaker:
    return Speaker.load(write_demo(tmp_path_factory.mktemp("demo") / "models"), "cpu")


def test_an_excerpt_is_the_film_there(speaker, tmp_path):
    picture, samples = torch.rand(3, SIDE, SIDE), torch.from_numpy(music(1, 2.4).samples)
    frames = BLOCKS * FRAMES_PER_BLOCK - FRAMES_DROPPED
    stream = speaker.stream(tmp_path, picture, samples, "a woman", frames)
    whole = speaker.shown(stream)
    assert whole.shape == (frames, SIDE, SIDE, 3)
    wanted = [range(4, 5)]
    for blocks, found in zip(wanted, speaker.excerpts(stream, wanted), strict=True):
        first = blocks[0] * FRAMES_PER_BLOCK - FRAMES_DROPPED
        expected = whole[first : first + len(found)].float()
        assert len(found) == len(blocks) * FRAMES_PER_BLOCK
        away = (found.float() - expected).abs().mean()
        assert away < 0.1 * (found.float() - expected.roll(1, 0)).abs().mean()


@pytest.mark.parametrize("name", WISHES)
def test_what_a_prompt_asks_for_is_told_from_what_it_does_not(name):
    kind = KINDS[list(WISHES).index(name) % len(KINDS)]
    words, wish = WISHES[name]
    plain = plain_role(kind, 1, music(1, 3.0))
    asked = with_wish(plain, words, wish)
    assert asked.prompt.endswith(words) and asked.picture == plain.picture

    def right(role: Role) -> torch.Tensor:
        return role.truth(0, 14, JUDGED_AT).float()

    change = right(asked) - right(plain)
    assert change.any() and came(change, change) == pytest.approx(1) and came(0 * change, change) == 0
    noise = torch.randn(change.shape, generator=torch.Generator().manual_seed(0)) * 50
    assert abs(came(noise, change)) < 0.3
    obeyed, ignored = (Take(asked, right(role).to(torch.uint8)) for role in (asked, plain))
    assert obeyed.error() < 0.01 < 0.02 < ignored.error()


def test_rows_say_what_was_wanted():
    assert above("1", "lips", 0.8, 0.8).right and not above("1", "lips", 0.79, 0.8).right
    assert below("1", "lag", 1, 1).right and not below("1", "lag", 2, 1).right
    assert not above("1", "lips", numpy.nan, 0.8).right and not below("1", "lag", numpy.nan, 1).right


def test_windows_lie_where_they_are_wanted():
    for start in (5, 18, 19):
        blocks = blocks_at(start, 20 * DEFAULT_FPS)
        shown = blocks[0] * FRAMES_PER_BLOCK - FRAMES_DROPPED
        assert len(blocks) * FRAMES_PER_BLOCK >= SECONDS * DEFAULT_FPS
        assert blocks[-1] < blocks_for(20 * DEFAULT_FPS)
        assert start > 18 or 0 <= start * DEFAULT_FPS - shown < FRAMES_PER_BLOCK
