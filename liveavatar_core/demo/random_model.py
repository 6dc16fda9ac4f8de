"""The tiny random demo model: its sizes, names and numbers, and writing it in the real formats. Equal seeds give equal
bytes.
"""

import io
import json
import tempfile
from math import prod, sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from liveavatar_core.config import ModelConfig
from liveavatar_core.demo.files import DemoFiles, write_json
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.build import empty_dit
from liveavatar_core.weights.layout import lora_targets

_ABOUT = "Live Avatar demo model: random weights, so every picture it makes is noise."

DEMO_CONFIG = ModelConfig(
    dim=64,
    heads=2,
    ffn_dim=128,
    layers=4,
    audio_layers=(0, 2),
    audio_dim=64,
    audio_states=5,
    text_dim=64,
    text_len=64,
    freq_dim=64,
)
_TEXT = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 512}

_VERSION = 2  # raise it when any written byte changes
_LORA_RANK = 4
_VAE_DIM, _LATENT = 8, 16
_SPEECH_HEADS = 4
_SPEECH_CONV = 512  # ComfyUI's encoder fixes this width, so most of the demo's 12 MB are these convolutions
_SPEECH_KERNELS, _SPEECH_STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
_SPEECH_POSITIONS, _SPEECH_GROUPS = 128, 16
_LETTERS = 32  # outputs of the speech encoder's unused letter head
_SENTENCES = """
A woman talks to the camera in a quiet room. She smiles, nods and moves her hands while she is speaking.
A man with glasses sits at a desk and explains the news. The light is soft and the background does not move.
The portrait sings a slow song, looks to the left, then to the right, and closes her eyes for a moment.
A friendly teacher reads a story to the children; the picture is sharp, warm and natural, with steady lips.
一位女士在安静的房间里对着镜头说话，她微笑着点头，说话时双手轻轻移动。
一位戴眼镜的男士坐在桌前讲解新闻，光线柔和，背景保持不动。
画面中的人物唱着一首慢歌，先看左边，再看右边，然后闭上眼睛。
色调艳丽，静态，细节模糊不清，字幕，最差质量，低质量，多余的手指，面部变形，静止不动的画面。
""".strip().splitlines()


def write_demo(root: Path | str, seed: int = 0) -> DemoFiles:
    """Write the random model below `root`, or reuse what is there when complete and of this version and seed.

    Appears at once or not at all. Raises WeightsError for a folder that holds something else.
    """
    root = Path(root)
    files = DemoFiles(root)
    if files.is_stamped(**_said(seed)):
        return files
    if root.exists() and not files.exists and any(root.iterdir()):
        raise WeightsError(f"{root} is not empty and holds no demo model; choose another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        fresh = DemoFiles(Path(scratch) / "new")
        write_dit(fresh, seed)
        _save(fresh.lora, _draw_all(_lora_shapes(), seed))
        _save(fresh.vae, _draw_all(vae_shapes(_VAE_DIM), seed))
        _save(fresh.text_encoder, _draw_all(_text_shapes(), seed) | {"spiece_model": train_tokenizer()})
        _write_speech_encoder(fresh.speech_encoder, seed)
        fresh.stamp(**_said(seed))
        _publish(fresh.root, root, seed)
    return files


def vae_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a Wan2.1 VAE of base width `dim` (96 in the published one)."""
    widths = [dim * factor for factor in (1, 1, 2, 4, 4)]
    shapes = _conv("encoder.conv1", (dim, 3, 3, 3, 3))
    place = 0
    for level, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False)):
        for width in (narrow, wide):
            shapes |= _residual(f"encoder.downsamples.{place}", width, wide)
            place += 1
        if level < 3:
            shapes |= _conv(f"encoder.downsamples.{place}.resample.1", (wide, wide, 3, 3))
            if level > 0:  # the last two levels also halve time
                shapes |= _conv(f"encoder.downsamples.{place}.time_conv", (wide, wide, 3, 1, 1))
            place += 1
    shapes |= _ends("encoder", widths[-1], widths[-1], 2 * _LATENT)
    shapes |= _conv("conv1", (2 * _LATENT, 2 * _LATENT, 1, 1, 1)) | _conv("conv2", (_LATENT, _LATENT, 1, 1, 1))

    shapes |= _conv("decoder.conv1", (widths[-1], _LATENT, 3, 3, 3))
    place, entry = 0, widths[-1]
    for level, wide in enumerate(reversed(widths[1:])):
        for width in (entry, wide, wide):
            shapes |= _residual(f"decoder.upsamples.{place}", width, wide)
            place += 1
        entry = wide // 2
        if level < 3:
            shapes |= _conv(f"decoder.upsamples.{place}.resample.1", (entry, wide, 3, 3))
            if level < 2:
                shapes |= _conv(f"decoder.upsamples.{place}.time_conv", (2 * wide, wide, 3, 1, 1))
            place += 1
    return shapes | _ends("decoder", widths[-1], widths[1], 3)


def _conv(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _residual(name: str, narrow: int, wide: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.residual.0.gamma": (narrow, 1, 1, 1), f"{name}.residual.3.gamma": (wide, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", (wide, narrow, 3, 3, 3)) | _conv(f"{name}.residual.6", (wide, wide, 3, 3, 3))
    return shapes if narrow == wide else shapes | _conv(f"{name}.shortcut", (wide, narrow, 1, 1, 1))


def _ends(name: str, middle: int, last: int, out: int) -> dict[str, tuple[int, ...]]:
    """Middle block and head of an encoder or decoder."""
    shapes = _residual(f"{name}.middle.0", middle, middle) | _residual(f"{name}.middle.2", middle, middle)
    shapes |= {f"{name}.middle.1.norm.gamma": (middle, 1, 1), f"{name}.head.0.gamma": (last, 1, 1, 1)}
    shapes |= _conv(f"{name}.middle.1.to_qkv", (3 * middle, middle, 1, 1))
    shapes |= _conv(f"{name}.middle.1.proj", (middle, middle, 1, 1))
    return shapes | _conv(f"{name}.head.2", (out, last, 3, 3, 3))


def _lora_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {}
    for module, (out_features, in_features) in lora_targets(DEMO_CONFIG).items():
        shapes[f"{module}.lora_A.default.weight"] = (_LORA_RANK, in_features)
        shapes[f"{module}.lora_B.default.weight"] = (out_features, _LORA_RANK)
    return shapes


def _text_shapes() -> dict[str, tuple[int, ...]]:
    sizes = _TEXT
    dim, hidden, inner = sizes["d_model"], sizes["d_ff"], sizes["d_kv"] * sizes["num_heads"]
    shapes = {"shared.weight": (sizes["vocab_size"], dim), "encoder.final_layer_norm.weight": (dim,)}
    for i in range(sizes["num_layers"]):
        attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (inner, dim) for part in "qkv"}
        shapes |= {
            f"{attention}.SelfAttention.o.weight": (dim, inner),
            f"{attention}.SelfAttention.relative_attention_bias.weight": (32, sizes["num_heads"]),
            f"{attention}.layer_norm.weight": (dim,),
            f"{feed}.DenseReluDense.wi_0.weight": (hidden, dim),
            f"{feed}.DenseReluDense.wi_1.weight": (hidden, dim),
            f"{feed}.DenseReluDense.wo.weight": (dim, hidden),
            f"{feed}.layer_norm.weight": (dim,),
        }
    return shapes


def _speech_shapes() -> dict[str, tuple[int, ...]]:
    dim, conv = DEMO_CONFIG.audio_dim, _SPEECH_CONV
    shapes = {"masked_spec_embed": (dim,)}
    for i, kernel in enumerate(_SPEECH_KERNELS):
        name = f"feature_extractor.conv_layers.{i}"
        shapes |= _conv(f"{name}.conv", (conv, 1 if i == 0 else conv, kernel)) | _norm(f"{name}.layer_norm", conv)
    shapes |= _norm("feature_projection.layer_norm", conv) | _conv("feature_projection.projection", (dim, conv))
    positions = "encoder.pos_conv_embed.conv"
    shapes |= {
        f"{positions}.weight_g": (1, 1, _SPEECH_POSITIONS),
        f"{positions}.weight_v": (dim, dim // _SPEECH_GROUPS, _SPEECH_POSITIONS),
        f"{positions}.bias": (dim,),
    }
    for i in range(DEMO_CONFIG.audio_states - 1):
        name = f"encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _conv(f"{name}.attention.{part}", (dim, dim))
        shapes |= _conv(f"{name}.feed_forward.intermediate_dense", (4 * dim, dim))
        shapes |= _conv(f"{name}.feed_forward.output_dense", (dim, 4 * dim))
        shapes |= _norm(f"{name}.layer_norm", dim) | _norm(f"{name}.final_layer_norm", dim)
    shapes |= _norm("encoder.layer_norm", dim)
    return {f"wav2vec2.{name}": shape for name, shape in shapes.items()} | _conv("lm_head", (_LETTERS, dim))


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _draw_all(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def draw(name: str, noise: Tensor) -> Tensor:
    """Scale noise so that activations stay of unit order through every layer."""
    if name.endswith(("gamma", "weight_g", "encoder.weights")) or (noise.ndim == 1 and name.endswith("weight")):
        values = 1 + 0.1 * noise
    elif name.endswith("bias") or noise.ndim == 1:
        values = 0.02 * noise
    elif name.endswith(("modulation", "cond_mask.weight", "padding_tokens")):
        values = 0.3 * noise
    elif name == "shared.weight":
        values = noise
    elif name.endswith("SelfAttention.q.weight"):
        values = noise / sqrt(noise.shape[1] * _TEXT["d_kv"])  # T5 does not scale its scores
    else:
        values = noise / sqrt(prod(noise.shape[1:]))
    return values.bfloat16()


def write_dit(files: DemoFiles, seed: int) -> None:
    """The DiT alone, in both layouts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_dit(DEMO_CONFIG).state_dict().items()}
    tensors = _draw_all(shapes, seed)
    config = _official_config()
    _save(files.single_file, tensors, {"config": json.dumps({"transformer": config})})

    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        shard = f"diffusion_pytorch_model-{number:05}-of-{len(halves):05}.safetensors"
        _save(files.shards / shard, {name: tensors[name] for name in half})
        weight_map |= dict.fromkeys(half, shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(files.shards / "diffusion_pytorch_model.safetensors.index.json", index)
    write_json(files.shards / "config.json", config)


def _official_config() -> dict:
    config = DEMO_CONFIG
    return {
        "_class_name": "WanModel_S2V",
        "model_type": "s2v",
        "dim": config.dim,
        "num_heads": config.heads,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.layers,
        "in_dim": config.channels,
        "out_dim": config.channels,
        "cond_dim": config.channels,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "text_len": config.text_len,
        "audio_dim": config.audio_dim,
        "audio_inject_layers": list(config.audio_layers),
        "num_audio_token": config.audio_tokens,
        "enable_adain": True,
        "adain_mode": "attn_norm",
        "enable_framepack": True,
        "framepack_drop_mode": "padd",
    }


def _write_speech_encoder(folder: Path, seed: int) -> None:
    dim = DEMO_CONFIG.audio_dim
    _save(folder / "model.safetensors", _draw_all(_speech_shapes(), seed))
    config = {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": DEMO_CONFIG.audio_states - 1,
        "num_attention_heads": _SPEECH_HEADS,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "conv_bias": True,
        "conv_dim": [_SPEECH_CONV] * len(_SPEECH_KERNELS),
        "conv_kernel": list(_SPEECH_KERNELS),
        "conv_stride": list(_SPEECH_STRIDES),
        "num_conv_pos_embeddings": _SPEECH_POSITIONS,
        "num_conv_pos_embedding_groups": _SPEECH_GROUPS,
        "layer_norm_eps": 1e-5,
        "vocab_size": _LETTERS,
    }
    write_json(folder / "config.json", config)
    preprocessor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True, "feature_size": 1}
    write_json(folder / "preprocessor_config.json", preprocessor | {"padding_value": 0.0, "sampling_rate": 16_000})


def train_tokenizer() -> Tensor:
    """A sentencepiece model of the sentences above, as the bytes that ComfyUI keeps in `spiece_model`."""
    # Comes with ComfyUI; the core itself does not need it.
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        character_coverage=1.0,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry only: safetensors writes several in random order, and equal seeds should give equal bytes.
    save_file(tensors, path, metadata or {"format": "pt"})


def _said(seed: int) -> dict[str, object]:
    return {"about": _ABOUT, "version": _VERSION, "seed": seed}


def _publish(fresh: Path, root: Path, seed: int) -> None:
    """Put the finished folder in place of what is there."""
    if root.exists():
        root.rename(fresh.parent / "old")
    try:
        fresh.rename(root)
    except OSError:
        # Another process may have written the same demo in between.
        if not DemoFiles(root).is_stamped(**_said(seed)):
            raise
