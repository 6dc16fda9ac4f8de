"""Where the files of a demo model lie, and the stamp that says what they are."""

import json
from dataclasses import dataclass
from pathlib import Path

from liveavatar_core.config import LoraSpec, ModelConfig, ModelSpec
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.file import SafetensorsFile
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.reader import open_weights

SHIPPED = Path(__file__).parents[2] / "models"  # a clone's and the registry's; a wheel has none

_STAMP = "demo.json"


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """Where the parts of a demo model lie. `root` can also serve as a folder of ComfyUI models."""

    root: Path

    @property
    def shards(self) -> Path:
        """Folder in the official layout: index, shards, config.json. Only the random model has it, and the LoRA."""
        return self.root / "Wan2.2-S2V-14B"

    @property
    def single_file(self) -> Path:
        return self.root / "diffusion_models" / "live_avatar_demo_bf16.safetensors"

    @property
    def lora(self) -> Path:
        return self.root / "loras" / "live_avatar_demo_lora.safetensors"

    @property
    def vae(self) -> Path:
        return self.root / "vae" / "live_avatar_demo_vae.safetensors"

    @property
    def text_encoder(self) -> Path:
        """umT5 in ComfyUI's single-file layout, tokenizer included; `text_config` has its sizes."""
        return self.root / "text_encoders" / "live_avatar_demo_umt5.safetensors"

    @property
    def speech_encoder(self) -> Path:
        """Folder in the layout of wav2vec2-large-xlsr-53-english."""
        return self.root / "audio_encoders" / "live_avatar_demo_wav2vec2"

    @property
    def model(self) -> ModelSpec:
        """Shards with the LoRA where they are, so that both are tried; else the single file."""
        return ModelSpec(self.shards, (LoraSpec(self.lora),)) if self.shards.is_dir() else ModelSpec(self.single_file)

    @property
    def config(self) -> ModelConfig:
        with open_weights(self.single_file) as reader:
            return infer_config(reader.infos(), reader.config)

    @property
    def text_config(self) -> dict[str, int]:
        """Where the text encoder differs from umT5-XXL; names as in its config in transformers and in ComfyUI."""
        shapes = {name: info.shape for name, info in SafetensorsFile(self.text_encoder).infos.items()}
        layer = "encoder.block.0.layer"
        vocabulary, width = shapes["shared.weight"]
        heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"][1]
        return {
            "d_model": width,
            "d_ff": shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0],
            "d_kv": shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
            "num_heads": heads,
            "num_layers": sum(name.endswith("SelfAttention.q.weight") for name in shapes),
            "vocab_size": vocabulary,
        }

    @property
    def about(self) -> str:
        """In a sentence: what these weights are."""
        return self._stamp()["about"]

    @property
    def exists(self) -> bool:
        return (self.root / _STAMP).is_file()

    def check(self) -> None:
        """Raises WeightsError unless every file of weights is as long as it was when it was written."""
        for name, size in self._stamp()["bytes"].items():
            path = self.root / name
            found = path.stat().st_size if path.is_file() else 0
            if found != size:
                raise WeightsError(f"{path} has {found} bytes, the demo model's has {size}; get this pack again")

    def stamp(self, **said: object) -> None:
        """Write down what these weights are, once all are there."""
        write_json(self.root / _STAMP, said | {"bytes": _sizes(self.root)})

    def is_stamped(self, **said: object) -> bool:
        """Whether the stamp says exactly this, of files of weights as long as they are now."""
        try:
            stamp = self._stamp()
        except (OSError, ValueError):
            return False
        return stamp == said | {"bytes": _sizes(self.root)}

    def _stamp(self) -> dict:
        return json.loads((self.root / _STAMP).read_text(encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sizes(root: Path) -> dict[str, int]:
    """Of the weights alone: the text files beside them may get other line ends on the way."""
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in sorted(root.rglob("*.safetensors"))}
