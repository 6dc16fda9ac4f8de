"""The shape of a model, read off its tensors. Decision: shapes are facts, config.json only adds what they cannot say
(heads, audio layers, text length), and a contradiction between the two is an error.
"""

from collections.abc import Mapping

from liveavatar_core.config import LIVE_AVATAR_14B, ModelConfig
from liveavatar_core.errors import ConfigError, WeightsError
from liveavatar_core.weights.file import TensorInfo

_HEAD_DIM = 128  # of every published Wan model
_NAMES_IN_JSON = {
    "dim": "dim",
    "num_layers": "layers",
    "ffn_dim": "ffn_dim",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "audio_dim": "audio_dim",
    "num_audio_token": "audio_tokens",
    "in_dim": "channels",
}


def infer_config(infos: Mapping[str, TensorInfo], config: dict | None) -> ModelConfig:
    """The model that these tensors make. `config`: the checkpoint's config.json, None without one.

    Raises WeightsError when a tensor is missing, when the two disagree, or when a config.json is needed and absent.
    """
    sizes = _sizes(infos)
    stated = config or {}
    for key, field in _NAMES_IN_JSON.items():
        if key in stated and stated[key] != sizes[field]:
            raise WeightsError(
                f"config.json says {key}={stated[key]} but the tensors say {sizes[field]}; "
                "use the config.json that came with these weights"
            )
    if "num_heads" not in stated and sizes["dim"] % _HEAD_DIM:
        raise WeightsError(
            f"a model of width {sizes['dim']} does not split into heads of {_HEAD_DIM}; "
            "it needs a config.json with num_heads"
        )
    try:
        return ModelConfig(
            **sizes,
            heads=stated.get("num_heads", sizes["dim"] // _HEAD_DIM),
            audio_layers=_audio_layers(infos, sizes["layers"], stated),
            text_len=stated.get("text_len", LIVE_AVATAR_14B.text_len),
        )
    except ConfigError as error:
        raise WeightsError(f"config.json does not fit the tensors: {error}") from error


def official_config(config: ModelConfig) -> dict[str, object]:
    """What a config.json must say for `infer_config` to find this model in its tensors."""
    stated: dict[str, object] = {key: getattr(config, field) for key, field in _NAMES_IN_JSON.items()}
    chosen = {"num_heads": config.heads, "audio_inject_layers": list(config.audio_layers), "text_len": config.text_len}
    return stated | chosen


def lora_targets(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every linear that the published LoRA changes: 448 at the real size."""
    square, up, down = (config.dim, config.dim), (config.ffn_dim, config.dim), (config.dim, config.ffn_dim)
    targets = {}
    for layer in range(config.layers):
        for attention in ("self_attn", "cross_attn"):
            targets |= {f"blocks.{layer}.{attention}.{part}": square for part in "qkvo"}
        targets |= {f"blocks.{layer}.ffn.0": up, f"blocks.{layer}.ffn.2": down}
    for injection in range(len(config.audio_layers)):
        targets |= {f"audio_injector.injector.{injection}.{part}": square for part in "qkvo"}
    return targets


def _sizes(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in infos:
            raise WeightsError(f"the checkpoint has no {name}; download it again")
        if len(infos[name].shape) != rank:
            raise WeightsError(
                f"{name} has shape {infos[name].shape}; it must have {rank} axes: download the file again"
            )
        return infos[name].shape

    dim, channels = shape("patch_embedding.weight", 5)[:2]
    local_out, audio_dim = shape("casual_audio_encoder.encoder.conv1_local.conv.weight", 3)[:2]
    return {
        "dim": dim,
        "channels": channels,
        "layers": _count(infos, "blocks."),
        "ffn_dim": shape("blocks.0.ffn.0.weight", 2)[0],
        "text_dim": shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shape("time_embedding.0.weight", 2)[1],
        "audio_dim": audio_dim,
        "audio_states": shape("casual_audio_encoder.weights", 4)[1],
        # conv1_local makes all local tokens at once, conv2 reads them one by one.
        "audio_tokens": local_out // shape("casual_audio_encoder.encoder.conv2.conv.weight", 3)[1],
    }


def _count(infos: Mapping[str, TensorInfo], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in infos if name.startswith(prefix)})


def _audio_layers(infos: Mapping[str, TensorInfo], layers: int, stated: dict) -> tuple[int, ...]:
    injectors = _count(infos, "audio_injector.injector.")
    published = LIVE_AVATAR_14B
    if "audio_inject_layers" in stated:
        chosen = tuple(stated["audio_inject_layers"])
    elif (layers, injectors) == (published.layers, len(published.audio_layers)):
        chosen = published.audio_layers
    else:
        raise WeightsError(
            f"which of {layers} layers the {injectors} audio injectors follow is not known; "
            "it needs a config.json with audio_inject_layers"
        )
    if len(chosen) != injectors:
        raise WeightsError(
            f"config.json names {len(chosen)} audio layers but the tensors have {injectors} injectors; "
            "use the config.json that came with these weights"
        )
    return chosen
