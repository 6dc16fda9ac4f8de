"""Frozen settings, validated where they are made and trusted afterwards. Defaults exist only here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liveavatar_core.errors import ConfigError

MAX_STEPS = 50
DISTANCE_RANGE = (4, 30)  # latents between a block and the rolled reference; the range seen in training


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a causal DiT. `LIVE_AVATAR_14B` is the only one with published weights."""

    dim: int
    heads: int
    ffn_dim: int
    layers: int
    audio_layers: tuple[int, ...]  # layers followed by an audio injection
    audio_dim: int = 1024
    audio_states: int = 25  # hidden states of the speech encoder, mixed by learned weights
    audio_tokens: int = 4  # local audio tokens per latent frame, before the learned padding token
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    channels: int = 16

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim={self.dim} is not divisible by heads={self.heads}")
        if (self.dim // self.heads) % 2:
            raise ConfigError(f"head size {self.dim // self.heads} is odd; rotary embedding needs pairs of channels")
        if any(not 0 <= layer < self.layers for layer in self.audio_layers):
            raise ConfigError(f"audio_layers={self.audio_layers} are not all within 0..{self.layers - 1}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


LIVE_AVATAR_14B = ModelConfig(
    dim=5120,
    heads=40,
    ffn_dim=13824,
    layers=40,
    audio_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """What turns noise into one particular video."""

    steps: int = 4
    shift: float = 3.0  # flow-matching time shift
    seed: int = 0
    noise: Literal["block", "clip"] = "block"  # "clip": the original's draw of four blocks from seed + clip
    distance: int | tuple[tuple[int, ...], ...] | None = None  # fixed; or [block][step]; or None: drawn from seed
    reanchor_block: int | None = 4  # first block that sees the generated reference; None never switches
    rope_rounding: bool = True  # round rotary factors to float16 as the model was trained
    skip_last_step: bool = False  # jump over the almost noiseless last level; the others stay where they are

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ConfigError(f"steps is {self.steps}; it must be 1..{MAX_STEPS}, and the model was distilled for 4")
        if self.skip_last_step and self.steps == 1:
            raise ConfigError("skip_last_step leaves nothing to do with steps 1; use 2 steps or more")
        if self.shift <= 0:
            raise ConfigError(f"shift is {self.shift}; it must be positive")
        if isinstance(self.distance, int) and self.distance < 1:
            raise ConfigError(f"distance is {self.distance}; it must be at least 1 latent")
        if self.reanchor_block is not None and self.reanchor_block < 1:
            raise ConfigError(f"reanchor_block is {self.reanchor_block}; block 0 must exist first, so at least 1")

    @property
    def evaluations(self) -> int:
        """Forwards per block: the steps that a plan shares out."""
        return self.steps - self.skip_last_step


@dataclass(frozen=True, slots=True)
class LoraSpec:
    path: Path
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which files make the model. Naming them loads nothing."""

    checkpoint: Path  # folder of shards, or one safetensors file
    loras: tuple[LoraSpec, ...] = ()


PRECISIONS = ("auto", "bf16", "fp32", "fp8")
ATTENTIONS = ("exact", "int8")
KV_CACHES = ("full", "fp8")


@dataclass(frozen=True, slots=True)
class RuntimeSpec:
    """Where and how the model runs."""

    devices: tuple[str, ...]  # in the order the plan hands them out
    plan: str = "auto"  # single, tpp, ring, rows x columns like 2x2, or auto: the fastest that fits
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"  # auto: bf16 on GPUs, fp32 on a CPU
    attention: Literal["exact", "int8"] = "exact"  # int8: products of queries and keys in 8 bits
    kv_cache: Literal["full", "fp8"] = "full"  # fp8: keys and values of past blocks in 8 bits
    vram: float | None = None  # GiB that may be used of each GPU; None: all that is free
    decoder: str = "auto"  # device of the VAE, or auto: where it disturbs least
    cluster: str | None = None  # stages in processes of a Ray cluster: its address, or local; None: in this process

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigError("no device was named; give at least one, like cuda:0 or cpu")
        for name, choices in (("precision", PRECISIONS), ("attention", ATTENTIONS), ("kv_cache", KV_CACHES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.vram is not None and self.vram <= 0:
            raise ConfigError(f"vram is {self.vram} GiB; it must be positive, or None for all that is free")
