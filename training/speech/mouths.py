"""What a mouth does while phonemes sound: opening, width and rounding, 100 times a second, with coarticulation."""

from collections.abc import Iterable

import numpy
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from training.speech.voices import Phoneme

RATE = 100  # of a mouth track, in Hz
OPEN, WIDE, ROUND = range(3)

# By letter of espeak's phoneme names: how open, how wide, how round. Diphthongs and affricates are read letter by
# letter, so that "aI" goes from a to I.
_SHAPES = {
    "a": (1.00, 0.20, 0.00), "A": (1.00, 0.05, 0.00), "&": (0.85, 0.35, 0.00), "V": (0.75, 0.10, 0.00),
    "0": (0.80, 0.00, 0.35), "Q": (0.80, 0.00, 0.35), "O": (0.65, 0.00, 0.60), "o": (0.50, 0.00, 0.75),
    "U": (0.30, 0.00, 0.80), "u": (0.24, 0.00, 1.00), "w": (0.16, 0.00, 1.00), "y": (0.22, 0.00, 0.85),
    "Y": (0.35, 0.00, 0.70), "W": (0.45, 0.00, 0.60), "2": (0.40, 0.00, 0.60), "3": (0.42, 0.00, 0.25),
    "@": (0.42, 0.10, 0.05), "E": (0.60, 0.50, 0.00), "e": (0.48, 0.60, 0.00), "I": (0.34, 0.65, 0.00),
    "i": (0.28, 0.90, 0.00), "j": (0.24, 0.60, 0.00),
    "p": (0.00, 0.00, 0.00), "b": (0.00, 0.00, 0.00), "m": (0.00, 0.00, 0.00), "B": (0.05, 0.00, 0.00),
    "f": (0.07, 0.25, 0.00), "v": (0.07, 0.25, 0.00),
    "T": (0.15, 0.20, 0.00), "D": (0.15, 0.20, 0.00), "t": (0.15, 0.25, 0.00), "d": (0.15, 0.25, 0.00),
    "s": (0.12, 0.40, 0.00), "z": (0.12, 0.40, 0.00), "n": (0.16, 0.20, 0.00), "l": (0.24, 0.20, 0.00),
    "S": (0.16, 0.00, 0.60), "Z": (0.16, 0.00, 0.60), "r": (0.24, 0.00, 0.35), "R": (0.28, 0.00, 0.00),
    "k": (0.26, 0.10, 0.00), "g": (0.26, 0.10, 0.00), "N": (0.26, 0.10, 0.00), "x": (0.28, 0.00, 0.00),
    "C": (0.20, 0.50, 0.00), "h": (0.36, 0.10, 0.00), "c": (0.20, 0.40, 0.00),
}  # fmt: skip
_LIPS_MEET = "pbm"
_STOPS = "pbtdkg"
_EARLY = 0.04  # s by which a stop's closure comes before the sound that names it
_LAX = 0.035  # s, of the smoothing that stands for slow muscles
_QUICK = 0.012  # s, for lips that meet


def mouth_track(phonemes: Iterable[Phoneme], seconds: float) -> NDArray[numpy.float32]:
    """(3, RATE * seconds): open 0..1, wide -1..1, round 0..1; all 0 where nothing is said."""
    track = numpy.zeros((3, round(seconds * RATE)))
    meeting = numpy.zeros(track.shape[1])
    for phoneme in phonemes:
        if phoneme.name[0] in "_(":  # a pause, or a change of language
            continue
        letters = [letter for letter in phoneme.name if letter in _SHAPES] or ["@"]
        start = phoneme.start - (_EARLY if letters[0] in _STOPS else 0.0)
        bounds = numpy.linspace(start, phoneme.end, len(letters) + 1)
        for letter, begin, end in zip(letters, bounds, bounds[1:], strict=False):
            place = slice(max(0, round(begin * RATE)), max(0, round(end * RATE)))
            track[:, place] = numpy.array(_SHAPES[letter])[:, None]
            meeting[place] = letter in _LIPS_MEET
    track = gaussian_filter1d(track, _LAX * RATE, axis=1)
    track[OPEN] *= 1 - gaussian_filter1d(meeting, _QUICK * RATE)
    return track.astype(numpy.float32)
