"""What crosses a package boundary: frozen data. C channels, F latent frames of a block, h w latent size."""

from dataclasses import dataclass

from torch import Tensor

from liveavatar_core.model.audio import AudioTokens


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What stays the same from block to block, as the encoders give it."""

    text: Tensor  # (length, text_dim), true length; padding is the model's business
    reference: Tensor  # (C, 1, h, w) latent of the picture
    motion: Tensor  # (C, up to 19, h, w) latents of the past, oldest first


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """Driver -> pipeline: make this block."""

    block: int
    features: Tensor  # (speakers, hidden states, width, 12)
    sink: int = 0  # version of the attention sink this block looks at
    noise: Tensor | None = None  # (C, F, h, w); None: drawn from (seed, block)
    pose: Tensor | None = None  # (C, F, h, w); None: no pose video
    mask: Tensor | None = None  # (speakers, F, rows, columns, 1) for several speakers


@dataclass(frozen=True, slots=True)
class Payload:
    """Stage -> stage: one block (or one sink version) on its way. Everything that belongs to it travels with it."""

    block: int
    step: int  # PREFILL for a sink version
    sink: int
    latent: Tensor | None = None  # (C, F, h, w)
    hidden: Tensor | None = None  # (1, tokens, D) in the middle of a step
    audio: AudioTokens | None = None
    pose: Tensor | None = None
    request: BlockRequest | None = None  # until the first stage has turned it into latent and audio tokens
    condition: tuple[Tensor, Tensor] | None = None  # a prefill's reference and motion, until they are tokens
