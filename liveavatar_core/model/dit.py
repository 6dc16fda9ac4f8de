"""The causal DiT for a range of layers, so that a pipeline stage can own a part of it.

It knows tokens, time and caches of its layers; not blocks in flight, noise, devices or files. Parameter names are
those of the published checkpoint (SPEC 7.2), spelling included.
Legend: B batch (1), C latent channels, F latent frames, h w latent size, T tokens, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveavatar_core.config import ModelConfig
from liveavatar_core.model.audio import AudioInjector, CausalAudioEncoder, Heard
from liveavatar_core.model.hosted import HostedLayers
from liveavatar_core.model.layers import DiTLayer, Head, KeyValue, See
from liveavatar_core.model.motion import FramePacker

NOISY, REFERENCE, MOTION = range(3)  # rows of trainable_cond_mask: the kinds of tokens
_PATCH = (1, 2, 2)


@dataclass(frozen=True, slots=True)
class TimeTable:
    """Modulation of one timestep, the same for every token and block."""

    embedding: Tensor  # (D,) float32, for the head
    modulation: Tensor  # (6, D) float32, for the layers


class CausalDiT(nn.Module):
    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        """`layers`: the part to build; None means all. Layer 0 brings the embeddings, the last layer the head."""
        super().__init__()
        self.config = config
        self.layers = layers = range(config.layers) if layers is None else layers
        dim = config.dim
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleDict({str(i): DiTLayer(dim, config.heads, config.ffn_dim) for i in layers})
        owned = [i for i, layer in enumerate(config.audio_layers) if layer in layers]
        self.audio_injector = AudioInjector(owned, dim, config.heads)
        if self.has_embedding:
            self.patch_embedding = nn.Conv3d(config.channels, dim, _PATCH, _PATCH)
            self.cond_encoder = nn.Conv3d(config.channels, dim, _PATCH, _PATCH)
            self.trainable_cond_mask = nn.Embedding(3, dim)
            self.frame_packer = FramePacker(config.channels, dim)
            self.casual_audio_encoder = CausalAudioEncoder(
                config.audio_states, config.audio_dim, dim, config.audio_tokens
            )
        if self.has_head:
            self.head = Head(dim, math.prod(_PATCH) * config.channels)
        self.hosted: HostedLayers | None = None  # set by who keeps some layers' weights in host memory

    @property
    def has_embedding(self) -> bool:
        return self.layers.start == 0

    @property
    def has_head(self) -> bool:
        return self.layers.stop == self.config.layers

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream and the caches."""
        return self.text_embedding[0].weight.dtype

    @property
    def nbytes(self) -> int:
        """Of the weights on the device, and of the buffers for those that only visit it."""
        hosted = self.hosted
        here = sum(tensor.nbytes for name, tensor in self.state_dict().items() if hosted is None or name not in hosted)
        return here + (0 if hosted is None else hosted.device_bytes)

    def embed_text(self, text_SD: Tensor) -> list[KeyValue]:
        """(length, text_dim) -> keys and values of the text for each owned layer.

        Padded with zeros *before* the MLP and never masked: the model attends to the padding, as it was trained to.
        """
        text_SD = text_SD[: self.config.text_len].to(self.dtype)
        padded = F.pad(text_SD, (0, 0, 0, self.config.text_len - text_SD.shape[0]))
        context_BSD = self.text_embedding(padded.unsqueeze(0))
        if self.hosted is not None:
            self.hosted.restart()
        return [layer.cross_attn.key_value(context_BSD) for _, layer in self._visits()]

    def time_table(self, timestep: float) -> TimeTable:
        """Modulation at one timestep (1000 * sigma), unrounded."""
        return self.modulate(waves(timestep, self.config.freq_dim).to(self.time_embedding[0].weight.device))

    def modulate(self, waves_W: Tensor) -> TimeTable:
        """The same of a timestep's waves."""
        x = waves_W
        for module in self.time_embedding:
            x = _linear32(module, x) if isinstance(module, nn.Linear) else module(x)
        return TimeTable(x, _linear32(self.time_projection[1], F.silu(x)).unflatten(0, (6, -1)))

    def embed_block(self, latent_CFhw: Tensor, pose_CFhw: Tensor | None = None) -> Tensor:
        """Noisy latents -> (1, T, D). Without a pose the condition encoder still adds its bias."""
        x_BDFhw = self.patch_embedding(latent_CFhw.unsqueeze(0))
        if pose_CFhw is None:
            x_BDFhw = x_BDFhw + self.cond_encoder.bias.view(1, -1, 1, 1, 1)
        else:
            x_BDFhw = x_BDFhw + self.cond_encoder(pose_CFhw.unsqueeze(0))
        return _tokens(x_BDFhw) + self.trainable_cond_mask.weight[NOISY]

    def embed_condition(self, reference_CFhw: Tensor, motion_CFhw: Tensor) -> Tensor:
        """Reference latent and motion latents -> (1, sink_tokens, D), reference first."""
        kinds = self.trainable_cond_mask.weight
        reference = _tokens(self.patch_embedding(reference_CFhw.unsqueeze(0))) + kinds[REFERENCE]
        return torch.cat((reference, self.frame_packer(motion_CFhw.unsqueeze(0)) + kinds[MOTION]), dim=1)

    def run_layers(
        self,
        x_BTD: Tensor,
        modulation_6D: Tensor,
        factors: Tensor,
        text: Sequence[KeyValue],
        see: Callable[[int], See],
        hear: Callable[[int], Heard] | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """All owned layers. `see(layer)` gives the layer's memory, `hear(injection)` what an audio injection needs of
        the block's audio, asked for when the layer's weights are there; there is none in the prefill."""
        for context, (i, layer) in zip(text, self._visits(), strict=True):
            x_BTD = layer(x_BTD, modulation_6D, factors, context, see(i))
            if hear is not None and i in self.config.audio_layers:
                injection = self.config.audio_layers.index(i)
                x_BTD = self.audio_injector(x_BTD, injection, hear(injection), mask)
        return x_BTD

    def _visits(self) -> Iterator[tuple[int, DiTLayer]]:
        """Every owned layer in order, once its weights are on the device. To be exhausted."""
        for i in self.layers:
            if self.hosted is not None:
                self.hosted.enter(i)
            yield i, self.blocks[str(i)]
        if self.hosted is not None:
            self.hosted.leave()

    def velocity(self, x_BTD: Tensor, time: TimeTable, grid: tuple[int, int]) -> Tensor:
        """Tokens after the last layer -> (C, F, h, w): noise minus picture."""
        return unpatchify(self.head(x_BTD, time.embedding), grid, self.config.channels)


def waves(timestep: float, width: int) -> Tensor:
    """(width,) float32 on the CPU: how the time embedding sees a timestep."""
    half = width // 2
    angles = timestep * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((angles.cos(), angles.sin())).float()


def unpatchify(patches_BTP: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """(1, T, 4 * C) with the channel fastest inside a patch -> (C, F, h, w)."""
    patches = patches_BTP[0].view(-1, *grid, *_PATCH[1:], channels)
    return patches.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _tokens(x_BDFhw: Tensor) -> Tensor:
    return x_BDFhw.flatten(2).transpose(1, 2)


def _linear32(linear: nn.Linear, x: Tensor) -> Tensor:
    """Time tables are float32 whatever the checkpoint's dtype."""
    return F.linear(x, linear.weight.float(), linear.bias.float())
