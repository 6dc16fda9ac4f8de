"""Sizes of the demo model: 40 MB in all, two frames a second on two cores of a CPU."""

from liveavatar_core.config import ModelConfig
from training.world.motion import HEAD_DIM

SIDE = 256  # px
VAE_DIM = 16
SPEECH_DIM, SPEECH_LAYERS, SPEECH_HEADS = 96, 3, 4
TEXT = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 512}

DEMO = ModelConfig(
    dim=256,
    heads=256 // HEAD_DIM,
    ffn_dim=768,
    layers=7,
    audio_layers=(0, 2, 4),
    audio_dim=SPEECH_DIM,
    audio_states=SPEECH_LAYERS + 1,
    text_dim=TEXT["d_model"],
    text_len=48,
    freq_dim=128,
)
