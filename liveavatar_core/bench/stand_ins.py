"""Models of the published sizes with random weights: they cost what the real ones cost, and their pictures are noise.

They come through the doors that real files come through, so that nothing of the engine knows the difference.
"""

from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.config import ModelConfig
from liveavatar_core.demo.random_model import draw, vae_shapes
from liveavatar_core.encoders.audio_features import Wav2Vec2Speech
from liveavatar_core.encoders.vae import WanVAE, load_vae
from liveavatar_core.weights.build import empty_dit
from liveavatar_core.weights.file import TensorInfo
from liveavatar_core.weights.reader import WeightReader

OUTLIERS = (10.0, 50.0)  # smallest and largest factor
CHANNELS_PER_OUTLIER = 640  # 8 of 5,120 channels


class RandomWeights(WeightReader):
    """A checkpoint that no file holds, in bf16, drawn on `device`. Every tensor has its own seed: all precisions
    start from the same numbers.

    `outliers`: as trained transformers have them. One channel of 640, the same in all layers, is 10 to 50 times
    larger than the others: of the normed activations that enter a layer's attentions and its feed-forward, and of the
    rows that make values and the feed-forward's inner channels, so that the products after these see such channels too.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str, *, outliers: bool = False) -> None:
        super().__init__(Path("random weights"), [])
        shapes = {name: tuple(tensor.shape) for name, tensor in empty_dit(config).state_dict().items()}
        self._infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
        self._seeds = {name: seed for seed, name in enumerate(shapes)}
        self._device, self._outliers = device, outliers

    def get(self, name: str, device: torch.device | str | None = None) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seeds[name])
        noise = torch.randn(self._infos[name].shape, generator=generator, device=self._device)
        values = draw(name, noise)
        if self._outliers and name.startswith("blocks."):
            values = _with_outliers(name, values)
        return values.to(device or self._device)


def outlier_factors(channels: int) -> Tensor:
    """(channels,): ones, every 640th larger."""
    factors = torch.ones(channels)
    places = range(CHANNELS_PER_OUTLIER // 2, channels, CHANNELS_PER_OUTLIER) or [channels // 2]
    low, high = (torch.tensor(factor).log() for factor in OUTLIERS)
    factors[list(places)] = torch.linspace(high, low, len(places)).exp()
    return factors


def _with_outliers(name: str, values: Tensor) -> Tensor:
    if name.endswith(".modulation"):  # (1, 6, D): shift, scale, gate of the two normed inputs; 1 + scale multiplies
        factors = outlier_factors(values.shape[-1]).to(values)
        values[:, [1, 4]] = (1 + values[:, [1, 4]]) * factors - 1
    elif name.endswith("norm3.weight"):
        values *= outlier_factors(len(values)).to(values)
    elif name.endswith((".v.weight", "ffn.0.weight")):
        values *= outlier_factors(len(values)).to(values).unsqueeze(1)
    return values


def random_vae(width: int, device: torch.device | str) -> WanVAE:
    """A Wan 2.1 VAE of base width `width` (96 in the published one): bf16, float32 on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    state = {
        name: draw(name, torch.randn(shape, generator=generator, device=device))
        for name, shape in vae_shapes(width).items()
    }
    return load_vae(state, dtype=encoder_dtype(device), device=device)


def random_speech(config: ModelConfig, device: torch.device | str) -> Wav2Vec2Speech:
    """The wav2vec2 that belongs to a model of this shape: for the published one, wav2vec2-large."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model  # takes seconds to import

    sizes = Wav2Vec2Config(
        hidden_size=config.audio_dim,
        intermediate_size=4 * config.audio_dim,
        num_hidden_layers=config.audio_states - 1,
        num_attention_heads=config.audio_dim // 64,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Wav2Vec2Model(sizes)
    return Wav2Vec2Speech(model.to(device, encoder_dtype(device)))  # not every parameter obeys the context


def encoder_dtype(device: torch.device | str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
