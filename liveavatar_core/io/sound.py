"""Sound files to waveforms, and waveforms to what the speech encoder hears.

Owns decoding, mixing and resampling, all by librosa, and the refusal of sound nothing can be made from. Does not know
features or frames.
"""

from pathlib import Path

import librosa
import numpy
import torch
from torch import Tensor

from liveavatar_core.errors import InputError
from liveavatar_core.geometry import SAMPLE_RATE

MIN_SECONDS = 0.1  # the shortest sound with a feature for every frame it covers
SILENT_PEAK = 1e-3  # -60 dB of full scale


def load_sound(path: str | Path) -> tuple[Tensor, int]:
    """Read a sound file as it is: waveform (channels, N) float32 and its rate in Hz. Raises InputError."""
    try:
        samples, rate = librosa.load(path, sr=None, mono=False)
    except Exception as error:  # every decoder librosa tries has errors of its own
        reason = str(error) or type(error).__name__
        raise InputError(f"the sound file {path} cannot be read ({reason}); convert it to WAV, FLAC or MP3") from error
    return torch.from_numpy(numpy.atleast_2d(samples)), int(rate)


def check_sound(waveform: Tensor, rate: int) -> list[str]:
    """Warnings about a waveform (channels, N) that can be used; InputError about one that cannot."""
    if waveform.dim() != 2 or not waveform.numel():
        raise InputError(f"the sound is empty, its shape is {tuple(waveform.shape)}; load another recording")
    if rate <= 0:
        raise InputError(f"the sound's rate is {rate} Hz; it must be positive: export it again")
    seconds = waveform.shape[1] / rate
    if seconds < MIN_SECONDS:
        raise InputError(f"the sound lasts {seconds:.3f} s; at least {MIN_SECONDS} s are needed: use a longer one")
    low, high = (bound.item() for bound in torch.aminmax(waveform))  # one pass, no copy; NaN and infinity show
    peak = max(-low, high)
    if not peak < float("inf"):
        raise InputError("the sound contains values that are not finite numbers; export it again")
    if peak < SILENT_PEAK:
        return [f"the sound is silent (peak {peak:.1e} of full scale); the mouth will hardly move"]
    return []


def to_speech(waveform: Tensor, rate: int) -> Tensor:
    """(channels, N) at any rate -> (M,) float32 mono at 16 kHz, M = ceil(N * 16000 / rate).

    Channels are averaged before resampling, as librosa does when it loads; mono at 16 kHz is not copied.
    """
    mono = waveform[0] if len(waveform) == 1 else waveform.mean(0)
    if rate == SAMPLE_RATE:
        return mono.float()
    return torch.from_numpy(
        librosa.resample(mono.float().cpu().numpy(), orig_sr=rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
    )
