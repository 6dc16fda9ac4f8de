"""From what is said, how, and when, to poses.

Decision: nothing here is random. Lips follow the phonemes, brows and nods follow how open the mouth has been, and the
head sways and blinks by the clock, so that a picture, a sound and a prompt leave one right video. A model that has to
guess nothing learns from little, and what it gets wrong can be measured.
The clock ticks at rates that a transformer can read off its rotary time positions, which know no end.
"""

import math
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_PER_LATENT
from liveavatar_core.model.rope import THETA, axis_widths
from training.speech.mouths import OPEN, RATE
from training.world.pose import Pose

HEAD_DIM = 64  # of the model that will learn this
_TIME_WIDTH = axis_widths(HEAD_DIM)[0]
QUICK, SLOW = (THETA ** (-2 * pair / _TIME_WIDTH) / FRAMES_PER_LATENT for pair in (1, 2))  # radians a frame
_BLINK_AT = 2.0  # radians of the slow clock: one blink every 4.7 s
_BLINK_FRAMES = 2.0
_BREATH = 0.25  # s, over which brows and nods follow the voice


@dataclass(frozen=True, slots=True)
class Action:
    """How somebody speaks; what a prompt can ask for."""

    smile: float = 0.0
    sway: float = 0.6
    nod: float = 0.2
    lively: float = 0.6


ACTIONS = {
    "talk": Action(),
    "calm": Action(sway=0.25, nod=0.05, lively=0.2),
    "lively": Action(sway=0.9, nod=0.3, lively=1.2),
    "smile": Action(smile=0.7),
    "laugh": Action(smile=1.0, nod=0.45, lively=0.9),
    "nod": Action(sway=0.3, nod=1.0),
}


def perform(mouth: NDArray[numpy.float32], action: str, first_frame: int, frames: int, clock: int) -> Pose:
    """Poses of `frames` video frames.

    `mouth` (3, n) is the track of the whole sound, `first_frame` the frame of the sound that comes first, `clock` that
    of the stream: its frame 0 is the first that the model makes.
    """
    acting = ACTIONS[action]
    track = _at_frames(mouth, first_frame, frames)
    voice = _at_frames(lately_open(mouth)[None], first_frame, frames)[0]
    time = numpy.arange(clock, clock + frames)
    slow, quick = numpy.sin(SLOW * time), numpy.sin(QUICK * time)
    away = (SLOW * time - _BLINK_AT + math.pi) % (2 * math.pi) - math.pi
    blink = numpy.exp(-((away / (SLOW * _BLINK_FRAMES)) ** 2))
    rows = (
        *track,
        numpy.full(frames, acting.smile),
        blink,
        acting.lively * voice,
        acting.sway * slow,
        acting.nod * quick + 0.25 * acting.lively * voice,
        0.045 * acting.sway * slow,
    )
    return Pose.of(torch.from_numpy(numpy.stack(rows, 1)))


def lately_open(mouth: NDArray[numpy.float32]) -> NDArray[numpy.float32]:
    """(n,) about 0..1: how open the mouth is around each moment, which brows and nods follow."""
    return gaussian_filter1d(mouth[OPEN], _BREATH * RATE) * 2.2


def _at_frames(track: NDArray, first: int, frames: int) -> NDArray:
    """(n, frames): the track in the middle of each video frame; its ends hold beyond it."""
    times = (numpy.arange(first, first + frames) + 0.5) * (RATE / DEFAULT_FPS) - 0.5
    places = numpy.arange(track.shape[1])
    return numpy.stack([numpy.interp(times, places, row) for row in track])
