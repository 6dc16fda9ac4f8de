"""Speech in the DiT: the causal encoder from hidden states to audio tokens, and the injection after chosen layers.

Legend: A speakers, N hidden states, C their width, t video frames, F latent frames, T tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveavatar_core.geometry import LATENTS_PER_BLOCK
from liveavatar_core.model.layers import CrossAttention, takes_rows
from liveavatar_core.model.pointwise import Activation, layer_norm, norm

ADAIN_EPS = 1e-5  # unlike every other norm of the model


@dataclass(frozen=True, slots=True)
class AudioTokens:
    """One block's audio. With several speakers, `mask` says whose voice moves which token."""

    local: Tensor  # (A, F, audio_tokens + 1, D)
    pooled: Tensor  # (A, F, 1, D)
    mask: Tensor | None = None  # (A, F, rows, columns, 1)

    def to(self, device: torch.device) -> "AudioTokens":
        mask = None if self.mask is None else self.mask.to(device)
        return AudioTokens(self.local.to(device), self.pooled.to(device), mask)


class CausalConv(nn.Module):
    """Kernel 3 over time, padded on the left with copies of the first frame."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2, 0), mode="replicate"))


def _norm_act(x_CT: Tensor) -> Tensor:
    return F.silu(layer_norm(x_CT.transpose(-1, -2))).transpose(-1, -2)


class _TokenEncoder(nn.Module):
    def __init__(self, audio_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.conv1_local = CausalConv(audio_dim, dim // 4 * tokens)
        self.conv1_global = CausalConv(audio_dim, dim // 4)
        self.conv2 = CausalConv(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.tokens = tokens

    def _down(self, x: Tensor) -> Tensor:
        """(n, D/4, t) -> (n, F, D)"""
        x = _norm_act(x)
        x = _norm_act(self.conv2(x))
        return _norm_act(self.conv3(x)).transpose(1, 2)

    def forward(self, x_ACt: Tensor) -> tuple[Tensor, Tensor]:
        speakers = x_ACt.shape[0]
        groups = self.conv1_local(x_ACt).unflatten(1, (self.tokens, -1)).flatten(0, 1)
        local = self._down(groups).unflatten(0, (speakers, self.tokens)).transpose(1, 2)
        padding = self.padding_tokens.expand(speakers, local.shape[1], 1, -1)
        pooled = self.final_linear(self._down(self.conv1_global(x_ACt)))
        return torch.cat((local, padding), dim=2), pooled.unsqueeze(2)


class CausalAudioEncoder(nn.Module):
    """Hidden states of the speech encoder -> tokens, 4 video frames to one latent frame. Runs in float32."""

    def __init__(self, states: int, audio_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, states, 1, 1))
        self.encoder = _TokenEncoder(audio_dim, dim, tokens)

    def mix(self, features_ANCt: Tensor) -> Tensor:
        """Weighted mean over the hidden states: (A, C, t)."""
        weights = F.silu(self.weights)
        return (features_ANCt * weights).sum(1) / weights.sum(1)

    def forward(self, features_ANCt: Tensor) -> tuple[Tensor, Tensor]:
        """Local tokens (A, F, tokens + 1, D) and pooled tokens (A, F, 1, D), F = ceil(ceil(t / 2) / 2)."""
        return self.encoder(self.mix(features_ANCt.float()))

    def block(self, features_ANCt: Tensor, dtype: torch.dtype) -> AudioTokens:
        """Tokens of one block's 12 video frames. A block hears no past: its first frame is repeated in front.

        The original repeats it 73 times; once gives the same three latents because padding is by replication.
        """
        local, pooled = self(torch.cat((features_ANCt[..., :1], features_ANCt), dim=-1))
        kept = slice(-LATENTS_PER_BLOCK, None)
        return AudioTokens(local[:, kept].to(dtype), pooled[:, kept].to(dtype))


@dataclass(frozen=True, slots=True)
class Heard:
    """What one injection makes of a block's audio: the same at every step."""

    k: Tensor  # (A, F, audio_tokens + 1, H, K)
    v: Tensor
    modulation: Tensor  # (A, F, 1, 2 * D) float32: shift, scale


class AdaptiveNorm(nn.Module):
    """LayerNorm whose shift and scale come from the pooled audio token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def modulation(self, pooled_F1D: Tensor) -> Tensor:
        """Shift and scale of every frame, (F, 1, 2 * D) float32."""
        return self.linear(F.silu(pooled_F1D)).float()

    def forward(self, x_FTD: Tensor, modulation: Tensor, *, rows: bool = False) -> Activation:
        shift, scale = modulation.chunk(2, dim=-1)
        return norm(x_FTD, scale, shift, eps=ADAIN_EPS, around_one=True, rows=rows)


class AudioInjector(nn.Module):
    """Cross attention from the noisy tokens of each latent frame to that frame's audio tokens."""

    def __init__(self, injections: list[int], dim: int, heads: int) -> None:
        """`injections`: positions in the model's list of audio layers; a stage may own only some of them."""
        super().__init__()
        self.injector = nn.ModuleDict({str(i): CrossAttention(dim, heads) for i in injections})
        self.injector_adain_layers = nn.ModuleDict({str(i): AdaptiveNorm(dim) for i in injections})

    def hear(self, injection: int, audio: AudioTokens) -> Heard:
        speakers_frames = audio.local.shape[:2]
        k, v = self.injector[str(injection)].key_value(audio.local.flatten(0, 1))
        modulation = self.injector_adain_layers[str(injection)].modulation(audio.pooled)
        return Heard(k.unflatten(0, speakers_frames), v.unflatten(0, speakers_frames), modulation)

    def forward(self, x_BTD: Tensor, injection: int, heard: Heard, mask: Tensor | None = None) -> Tensor:
        """`mask` as in AudioTokens."""
        attention, adain = self.injector[str(injection)], self.injector_adain_layers[str(injection)]
        k, v, modulation = (part.flatten(0, 1) for part in (heard.k, heard.v, heard.modulation))
        speakers, frames = heard.k.shape[:2]
        x_FTD = x_BTD.unflatten(1, (frames, -1)).expand(speakers, -1, -1, -1).flatten(0, 1)
        residual = attention(adain(x_FTD, modulation, rows=takes_rows(attention.q)), (k, v))
        residual = residual.unflatten(0, (speakers, frames)).flatten(1, 2)
        if mask is not None:
            residual = residual * mask.flatten(1, 3)
        # one speaker's sum would be a copy
        return x_BTD + (residual if speakers == 1 else residual.sum(0, keepdim=True))
