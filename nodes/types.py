"""Sockets that ComfyUI does not have, and what travels through them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "Live Avatar"

ModelSocket = io.Custom("LIVEAVATAR_MODEL")  # liveavatar_core.config.ModelSpec: names files, loads nothing
RuntimeSocket = io.Custom("LIVEAVATAR_RUNTIME")  # liveavatar_core.config.RuntimeSpec
SpeechSocket = io.Custom("LIVEAVATAR_AUDIO")  # Speech
StreamSocket = io.Custom("LIVEAVATAR_STREAM")  # Avatar


@dataclass(frozen=True, slots=True)
class Speech:
    """Sound and how it will be listened to. Encoding happens block by block, while the video is made."""

    waveform: "Tensor"  # (channels, samples) float32: what the viewer hears
    sample_rate: int
    encoder: Any  # the host's AUDIO_ENCODER
    fps: int

    @property
    def seconds(self) -> float:
        return self.waveform.shape[-1] / self.sample_rate


@dataclass(frozen=True, slots=True)
class Avatar:
    """A video that is made when it is pulled: the latent stream and the sound that belongs to it."""

    stream: Any  # liveavatar_core.runtime.stream.LatentStream
    speech: Speech
    frames: int
