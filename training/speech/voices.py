"""espeak-ng through its C library: samples, and when each phoneme begins.

The library is found where the system's loader looks for it, its data where ESPEAK_DATA_PATH says.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy
from numpy.typing import NDArray

LANGUAGES = ("en-us", "en", "en-gb-scotland", "de", "es", "fr", "it")
VARIANTS = ("", "m1", "m3", "m5", "m7", "f1", "f2", "f3", "f4", "f5", "croak", "klatt2")

_SYNCHRONOUS, _PHONEME_EVENTS, _UTF8 = 2, 1, 1
_LAST, _PHONEME = 0, 7  # kinds of events
_RATE, _PITCH, _RANGE = 1, 3, 4  # numbers of parameters


class _Name(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, slots=True)
class Voice:
    language: str = "en-us"
    variant: str = ""
    rate: int = 160  # words a minute
    pitch: int = 50  # 0..99
    range: int = 50  # 0 monotone .. 99


@dataclass(frozen=True, slots=True)
class Phoneme:
    name: str  # espeak's own; "_" and "_:" are pauses
    start: float  # seconds
    end: float


@dataclass(frozen=True, slots=True)
class Utterance:
    samples: NDArray[numpy.float32]  # at `rate`
    rate: int
    phonemes: tuple[Phoneme, ...]


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    library = ctypes.CDLL("libespeak-ng.so.1")
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS)
    if rate <= 0:
        raise RuntimeError("espeak-ng finds no data; install espeak-ng-data or set ESPEAK_DATA_PATH to its folder")
    return library, rate


def say(text: str, voice: Voice) -> Utterance:
    """One voice at a time: the library keeps global state."""
    library, rate = _library()
    chunks: list[NDArray[numpy.int16]] = []
    starts: list[tuple[str, float]] = []

    def receive(samples, count, events) -> int:
        if samples and count > 0:
            chunks.append(numpy.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != _LAST:
            if events[i].type == _PHONEME:
                starts.append((events[i].id.string.decode("utf-8", "replace"), events[i].sample / rate))
            i += 1
        return 0

    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)
    name = f"{voice.language}+{voice.variant}" if voice.variant else voice.language
    if library.espeak_SetVoiceByName(name.encode()):
        raise ValueError(f"espeak-ng has no voice {name}")
    for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.range)):
        library.espeak_SetParameter(parameter, value, 0)
    data = text.encode() + b"\0"
    library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = numpy.concatenate(chunks).astype(numpy.float32) / 32768
    ends = [start for _, start in starts[1:]] + [len(samples) / rate]
    phonemes = (Phoneme(name, start, end) for (name, start), end in zip(starts, ends, strict=True))
    return Utterance(samples, rate, tuple(p for p in phonemes if p.end > p.start))
