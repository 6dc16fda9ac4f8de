"""Puts the demo model's tiny files where a user has the real ones, under the names that the workflows ask for."""

import json
import shutil
from pathlib import Path

from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import write_demo

# Inputs of the loaders, ComfyUI's and ours: the folder of models they look in, and the demo's stand-in.
STAND_INS = {
    "clip_name": ("text_encoders", lambda demo: demo.text_encoder),
    "vae_name": ("vae", lambda demo: demo.vae),
    "audio_encoder_name": ("audio_encoders", lambda demo: demo.speech_encoder / "model.safetensors"),
    "lora_name": ("loras", lambda demo: demo.lora),
    "model_name": ("diffusion_models", lambda demo: demo.single_file),
}


def furnish_models(models: Path, workflows: Path) -> dict[str, dict[str, int]]:
    """Write the demo into `models`, and again under the names found in `workflows`; returns what tiny_host needs."""
    demo = write_demo(models)
    for workflow in sorted(workflows.glob("*.json")):
        for node in json.loads(workflow.read_text(encoding="utf-8")).values():
            for name in STAND_INS.keys() & node["inputs"].keys():
                folder, stand_in = STAND_INS[name]
                _place(stand_in(demo), demo.shards, models / folder, node["inputs"][name])
    return _sizes(demo)


def _sizes(demo: DemoFiles) -> dict[str, dict[str, int]]:
    speech = json.loads((demo.speech_encoder / "config.json").read_text())
    return {
        "text": demo.text_config,
        "speech": {
            "embed_dim": speech["hidden_size"],
            "num_heads": speech["num_attention_heads"],
            "num_layers": speech["num_hidden_layers"],
        },
    }


def _place(file: Path, shards: Path, folder: Path, name: str) -> None:
    """`name` is a file, or with a slash at its end a folder of shards; "none" and the like are left alone."""
    if (folder / name).exists():
        return
    if name.endswith("/"):
        shutil.copytree(shards, folder / name)
    elif name.endswith(".safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
