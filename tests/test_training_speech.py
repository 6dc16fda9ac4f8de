"""Speech with known mouths. Needs espeak-ng; mouths alone do not."""

import ctypes

import numpy
import pytest

from liveavatar_core.geometry import SAMPLE_RATE
from training.speech.mouths import OPEN, RATE, ROUND, WIDE, mouth_track
from training.speech.sounds import HELD_OUT_VOICES, WORDS, music, sound
from training.speech.voices import LANGUAGES, VARIANTS, Phoneme, Voice, say


def has_espeak() -> bool:
    try:
        ctypes.CDLL("libespeak-ng.so.1")
    except OSError:
        return False
    return True


needs_espeak = pytest.mark.skipif(not has_espeak(), reason="espeak-ng is not installed")


def track_of(*names: str, seconds: float = 0.25) -> numpy.ndarray:
    phonemes = [Phoneme(name, i * seconds, (i + 1) * seconds) for i, name in enumerate(names)]
    return mouth_track(phonemes, len(names) * seconds)


def test_vowels_and_lips():
    a, i, u = (track_of("_", name, "_")[:, 37] for name in ("A:", "i:", "u:"))
    assert a[OPEN] > 0.9 and a[OPEN] > 2 * i[OPEN] > 2 * 0.9 * u[OPEN] * 0.5
    assert i[WIDE] > 0.8 and u[ROUND] > 0.9 and a[ROUND] < 0.05
    for name in "pbm":
        middle = track_of("A:", name, "A:", seconds=0.12)[OPEN]
        assert middle.min() < 0.1 and middle[2] > 0.7  # lips meet even between two open vowels
    assert track_of("A:", "t", "A:", seconds=0.12)[OPEN].min() > 0.1


def test_a_diphthong_moves_and_pauses_are_closed():
    glide = track_of("_", "aU", "_")
    assert glide[OPEN, 29] > 0.8 > 0.6 > glide[OPEN, 45] and glide[ROUND, 45] > 0.4
    assert numpy.abs(track_of("_:", "_", "(de)", seconds=0.5)).max() == 0


@needs_espeak
def test_what_sounds_is_open():
    said = say("Mama made more money. Papa popped a pea.", Voice("en-us", rate=140))
    seconds = len(said.samples) / said.rate
    opening = mouth_track(said.phonemes, seconds)[OPEN]
    hop = said.rate // RATE
    energy = numpy.abs(said.samples[: len(opening) * hop]).reshape(-1, hop).mean(1)
    energy = numpy.convolve(energy, numpy.ones(5) / 5, "same")[: len(opening)]
    lags = range(-20, 21)
    fit = [numpy.corrcoef(numpy.roll(energy, lag), opening[: len(energy)])[0, 1] for lag in lags]
    assert max(fit) > 0.7 and abs(lags[int(numpy.argmax(fit))]) <= 4  # 40 ms, one frame


@needs_espeak
def test_every_voice_there_is_a_word_for_speaks():
    for language in LANGUAGES:
        assert language[:2] in WORDS
    for name in (("en-us", "croak"), ("fr", "f5"), *HELD_OUT_VOICES):
        assert name[0] in LANGUAGES and name[1] in VARIANTS
        assert len(say("mama", Voice(*name)).phonemes) > 3


@needs_espeak
def test_a_sound_has_its_mouth():
    heard = sound(1, 3.0)
    assert heard.samples.shape == (3 * SAMPLE_RATE,) and heard.mouth.shape == (3, 3 * RATE)
    assert heard.samples.dtype == numpy.float32 and numpy.abs(heard.samples).max() <= 1
    loud = numpy.abs(heard.samples).reshape(-1, SAMPLE_RATE // RATE).mean(1)
    opening = heard.mouth[OPEN]
    assert loud[opening > 0.3].mean() > 3 * loud[opening < 0.01].mean() > 0


def test_music_leaves_the_mouth_closed():
    heard = music(3, 2.0)
    assert heard.samples.std() > 0 and not heard.mouth.any()
