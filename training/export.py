"""Finished weights in the layouts in which the real files are published.

python -m training.export vae --folder .train             the VAE with scaled latents, for the stages after it
python -m training.export all --folder .train --to models  everything, as DemoFiles has it: the demo model from then on
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import vae_shapes
from liveavatar_core.geometry import DEFAULT_FPS, SAMPLE_RATE
from liveavatar_core.weights.layout import official_config
from training.front import new_front
from training.run import read_log, read_weights
from training.sizes import DEMO, SIDE
from training.text import TOKENIZER
from training.vae import draw_clip, new_vae, normalise

VAE_FILE = "vae.safetensors"
STAGES = ("vae", "front", "text", "dit")
_METADATA = {"format": "pt"}


def official_vae_names(state: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """diffusers' names back to the published ones."""
    names = list(vae_shapes(dim))
    # the converter only renames, so a number in place of each tensor shows where it went
    numbered = convert_wan_vae_to_diffusers({name: torch.tensor(i) for i, name in enumerate(names)})
    return {names[number.item()]: state[name] for name, number in numbered.items()}


def official_front_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The positional convolution's weight norm as the published file spells it."""
    new = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    named = {}
    for name, tensor in state.items():
        for modern, published in new.items():
            name = name.replace(modern, published)
        named[name] = tensor
    return named


def export_vae(folder: Path, side: int, clips: int = 48) -> Path:
    """Scale the latents and write folder/vae.safetensors; returns its path."""
    weights = _finished(folder, "vae")
    dim = weights["encoder.conv_in.weight"].shape[0]
    model = new_vae(dim)
    model.load_state_dict(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    drawn = torch.stack([draw_clip(10_000_000 + seed, side, device) for seed in range(clips)])
    normalise(model, drawn.float() / 127.5 - 1)
    _save(folder / VAE_FILE, official_vae_names(model.state_dict(), dim))
    return folder / VAE_FILE


def export_dit(folder: Path, path: Path) -> Path:
    """One file with its config, as ComfyUI has it."""
    config = json.dumps({"transformer": official_config(DEMO)})
    _save(path, _finished(folder, "dit"), {"config": config})
    return path


def export_front(folder: Path, to: Path) -> None:
    """A folder in the layout of wav2vec2-large-xlsr-53-english."""
    model = new_front()
    model.load_state_dict(_finished(folder, "front"))
    to.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(to)
    _save(to / "model.safetensors", official_front_names(model.state_dict()))
    hearing = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True, "feature_size": 1}
    hearing |= {"padding_value": 0.0, "sampling_rate": SAMPLE_RATE}
    (to / "preprocessor_config.json").write_text(json.dumps(hearing, indent=1) + "\n")


def export_text(folder: Path, path: Path) -> None:
    """umT5 in ComfyUI's single-file layout, tokenizer included."""
    prefix = "encoder."
    state = {n.removeprefix(prefix): t for n, t in _finished(folder, "text").items() if n.startswith(prefix)}
    del state["encoder.embed_tokens.weight"]  # shared.weight again
    words = torch.frombuffer(bytearray((folder / TOKENIZER).read_bytes()), dtype=torch.uint8)
    _save(path, state | {"spiece_model": words})


def export_all(folder: Path, to: Path) -> DemoFiles:
    files = DemoFiles(to)
    export_dit(folder, files.single_file)
    _save(files.vae, load_file(folder / VAE_FILE))
    export_text(folder, files.text_encoder)
    export_front(folder, files.speech_encoder)
    files.stamp(
        about=f"Live Avatar demo model: small, trained on drawn faces and computer voices at {SIDE}x{SIDE} and "
        f"{DEFAULT_FPS} frames a second; models/MODEL_CARD.md says what it can do.",
        training={stage: history[-1] for stage in STAGES if (history := read_log(folder, stage))},
    )
    return files


def _finished(folder: Path, stage: str) -> dict[str, Tensor]:
    weights = read_weights(folder, stage)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights of {stage}; run that stage first")
    return weights


def _save(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    save_file(stored, path, metadata or _METADATA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["vae", "all"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    if options.what == "vae":
        print(export_vae(options.folder, options.side))
        return
    if options.to is None:
        parser.error("all needs --to, the folder that gets the files")
    root = export_all(options.folder, options.to).root
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"{root}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
