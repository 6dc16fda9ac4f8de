"""Speech features of video frames: hidden states of a speech encoder, 50 per second, brought to 30 and then to fps.

Owns the rules that tie samples, features and video frames together, and a window over sound of any length. Does not
know where sound comes from or what the DiT makes of its features.

Decision: one window of hidden states is held at a time, for all 25 states of two hours would be 37 GB. A video frame
belongs to one window whatever the order of requests, so access at random and in sequence agree.
"""

import json
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from liveavatar_core.errors import InputError, WeightsError
from liveavatar_core.geometry import FRAMES_PER_BLOCK, FRAMES_PER_CLIP, SAMPLE_RATE

HIDDEN_STRIDE = 320  # samples between two hidden states of wav2vec2
HIDDEN_FIELD = 400  # samples one hidden state sees before attention
HIDDEN_RATE = SAMPLE_RATE // HIDDEN_STRIDE
FEATURE_RATE = 30  # the model was trained on features picked from this rate
WINDOW_SECONDS = 20.0
CONTEXT_SECONDS = 5.0  # on both sides; the positional convolution reaches 1.3 s, attention everywhere
CHUNK = 1 << 20  # samples summed at a time, in float32; their sums are added in float64


class SpeechEncoder(Protocol):
    """Normalised float32 samples (N,) at 16 kHz -> (states, hidden_length(N), D), on any device, in any float type."""

    def __call__(self, samples: Tensor) -> Tensor: ...


class Wav2Vec2Speech:
    """All hidden states of a transformers `Wav2Vec2Model`, the last one after the final layer norm."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, samples: Tensor) -> Tensor:
        output = self.model(samples[None].to(self.model.device, self.model.dtype), output_hidden_states=True)
        # transformers 4 ends its list with the normed state, transformers 5 with the one before the norm; the
        # original saw the former.
        return torch.cat([*output.hidden_states[:-1], output.last_hidden_state])


def load_speech_encoder(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> Wav2Vec2Speech:
    """Read a wav2vec2 folder as published: config.json with model.safetensors or pytorch_model.bin.

    Raises WeightsError if it is incomplete or of another model.
    """
    path = Path(path)
    try:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the speech encoder folder {path} has no readable config.json; download wav2vec2 whole"
        ) from error
    if kind != "wav2vec2":
        raise WeightsError(f"the speech encoder in {path} is of type {kind!r}; choose a wav2vec2 folder")
    from transformers import Wav2Vec2Model  # takes seconds to import, and who has features needs none of it

    try:
        model, found = Wav2Vec2Model.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"the speech encoder in {path} cannot be read ({reason}); download it again") from error
    # Training alone uses the mask vector, and some publishers leave it out.
    missing = sorted(set(found["missing_keys"]) - {"masked_spec_embed"})
    if missing:
        raise WeightsError(
            f"the speech encoder in {path} lacks {missing[0]} ({len(missing)} such tensors); download it again"
        )
    return Wav2Vec2Speech(model.to(device=device, dtype=dtype))


def hidden_length(samples: int) -> int:
    """Hidden states of `samples` samples."""
    return max(0, (samples - HIDDEN_FIELD) // HIDDEN_STRIDE + 1)


def feature_length(hidden: int) -> int:
    """Features at 30 Hz of `hidden` hidden states; the original's order of operations, which decides some ties."""
    return int(hidden / HIDDEN_RATE * FEATURE_RATE)


def feature_of_frame(frame: int, fps: float) -> int:
    """The 30 Hz feature of a video frame; halves go to the even feature, as in the original."""
    return round(frame / fps * FEATURE_RATE)


def clip_count(length: int, fps: float) -> int:
    """Clips the original makes of `length` features; sound of exactly n clips gets n + 1."""
    return int(length / (FRAMES_PER_CLIP * (FEATURE_RATE / fps))) + 1


def frame_index(frames: Iterable[int], length: int, fps: float) -> Tensor:
    """Feature of every video frame, int64; -1 for frames beyond the `length` features there are."""
    picks = (feature_of_frame(frame, fps) for frame in frames)
    return torch.tensor([pick if pick < length else -1 for pick in picks], dtype=torch.int64)


def positions(picks: Tensor, length: int) -> Tensor:
    """Where the 30 Hz features `picks` lie among `length` hidden states, ends on ends.

    float32, like the interpolation the features of training went through; after hours this is off by 1 ms.
    """
    gaps = feature_length(length) - 1
    scale = torch.tensor(length - 1, dtype=torch.float32) / gaps if gaps > 0 else torch.tensor(0.0)
    return picks.float() * scale


def interpolate(hidden: Tensor, where: Tensor) -> Tensor:
    """(states, T, D) at fractional positions (n,) in 0..T-1 -> (states, n, D) float32, rounded to hidden's type."""
    left = where.long().clamp(max=hidden.shape[1] - 1)
    right = (left + 1).clamp(max=hidden.shape[1] - 1).to(hidden.device)
    weight = (where - left).clamp(0, 1).to(hidden.device)[:, None]
    left = left.to(hidden.device)
    mixed = hidden[:, left].float() * (1 - weight) + hidden[:, right].float() * weight
    return mixed.to(hidden.dtype).float()


def to_feature_rate(hidden: Tensor) -> Tensor:
    """(states, T, D) at 50 Hz -> (states, feature_length(T), D) float32 at 30 Hz."""
    length = hidden.shape[1]
    return interpolate(hidden, positions(torch.arange(feature_length(length)), length))


def bucket(features: Tensor, fps: float) -> Tensor:
    """(states, L, D) at 30 Hz -> (1, states, D, frames): the original's whole clips, zeros after the end."""
    length = features.shape[1]
    index = frame_index(range(clip_count(length, fps) * FRAMES_PER_CLIP), length, fps)
    return _pick(features, index)[None]


def _pick(features: Tensor, index: Tensor) -> Tensor:
    """(states, L, D) at the frames of `index` -> (states, D, frames); zeros where the index is -1."""
    picked = features[:, index.clamp(min=0).to(features.device)]
    return picked.mul_((index >= 0).to(picked)[:, None]).transpose(1, 2)


class FeatureStream:
    """Features of any block of a sound, from one window of hidden states at a time.

    `samples` (N,) float32, mono, 16 kHz; not copied. `lead_frames` video frames of silence come first, so that sound
    stays with its picture where that many frames are dropped. Sound that fits in one window with its contexts is
    encoded whole, as the original does; longer sound in windows of `window_seconds` and `context_seconds` on both
    sides. Normalisation and indices are those of the whole sound in either case.
    """

    def __init__(
        self,
        samples: Tensor | numpy.ndarray,
        encoder: SpeechEncoder,
        *,
        fps: float,
        lead_frames: int = 0,
        window_seconds: float = WINDOW_SECONDS,
        context_seconds: float = CONTEXT_SECONDS,
    ) -> None:
        self._samples = torch.as_tensor(samples, dtype=torch.float32)
        if self._samples.dim() != 1:
            raise ValueError(f"samples are {tuple(self._samples.shape)}; (N,) mono is needed")
        self._encoder, self._fps = encoder, fps
        self._lead = round(lead_frames * SAMPLE_RATE / fps)
        self._hidden_length = hidden_length(self._lead + len(self._samples))
        self._length = feature_length(self._hidden_length)
        if self._length < 1:
            raise InputError(f"the sound has {len(self._samples)} samples at 16 kHz; at least 0.1 s is needed")
        self._mean, self._scale = _statistics(self._samples, self._lead)

        self._core = max(1, round(window_seconds * HIDDEN_RATE))
        self._context = max(1, round(context_seconds * HIDDEN_RATE))  # interpolation reads one state ahead
        if self._hidden_length <= self._core + 2 * self._context:
            self._core = self._hidden_length
        self._window: tuple[int, int, Tensor] | None = None  # its number, its first hidden state, the states

    @property
    def frames(self) -> int:
        """Video frames with features of sound, the lead included; later ones are zeros."""
        frame = math.ceil((self._length - 1) * self._fps / FEATURE_RATE)
        while feature_of_frame(frame, self._fps) < self._length:
            frame += 1
        return frame

    def block(self, block: int) -> Tensor:
        """(states, D, 12) float32: features of the block's frames, zeros beyond the end. Any order of blocks."""
        first = block * FRAMES_PER_BLOCK
        index = frame_index(range(first, first + FRAMES_PER_BLOCK), self._length, self._fps)
        where = positions(index.clamp(min=0), self._hidden_length)
        window = where.long() // self._core
        sounding = index >= 0
        numbers = window[sounding].unique().tolist() or [self._window[0] if self._window else 0]
        parts = [self._read(number, where[sounding & (window == number)]) for number in numbers]
        features = torch.cat(parts, 1)
        silence = features.new_zeros(features.shape[0], FRAMES_PER_BLOCK - features.shape[1], features.shape[2])
        return torch.cat([features, silence], 1).transpose(1, 2)

    def _read(self, number: int, where: Tensor) -> Tensor:
        """(states, n, D) at positions (n,) of a window, which is encoded unless it was the last one read."""
        if self._window is None or self._window[0] != number:
            self._window = None  # the old one's memory goes before the new one's comes
            start = max(0, number * self._core - self._context)
            end = min(self._hidden_length, (number + 1) * self._core + self._context)
            hidden = self._encoder(self._normalised(start, end))
            if hidden.dim() != 3 or hidden.shape[1] != end - start:
                raise WeightsError(
                    f"the speech encoder gave {tuple(hidden.shape)} where (states, {end - start}, width) is needed; "
                    "choose a wav2vec2 encoder"
                )
            self._window = number, start, hidden
        _, start, hidden = self._window
        return interpolate(hidden, where - start)

    def _normalised(self, start: int, end: int) -> Tensor:
        """Samples of hidden states start..end-1, with the mean and variance of the whole removed."""
        first, last = start * HIDDEN_STRIDE, (end - 1) * HIDDEN_STRIDE + HIDDEN_FIELD
        if end == self._hidden_length:
            last = self._lead + len(self._samples)  # the rest is too short for a state but the original passes it
        silence = self._samples.new_zeros(max(0, min(last, self._lead) - first))
        sound = self._samples[max(0, first - self._lead) : max(0, last - self._lead)]
        return (torch.cat([silence, sound]) - self._mean) / self._scale


def _statistics(samples: Tensor, lead: int) -> tuple[float, float]:
    """Mean, and root of population variance + 1e-7, of `lead` zeros and the samples, chunk by chunk."""
    count = lead + len(samples)
    mean = sum(chunk.sum().item() for chunk in samples.split(CHUNK)) / count
    squares = sum((chunk - mean).square_().sum().item() for chunk in samples.split(CHUNK))
    return mean, math.sqrt((squares + lead * mean**2) / count + 1e-7)
