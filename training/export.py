"""Finished weights in the layouts in which the real files are published.

python -m training.export vae --folder .train        the VAE, normalised, for the stages after it
python -m training.export all --folder .train --to DIR
"""

import argparse
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from liveavatar_core.demo import vae_shapes
from training.run import read_weights
from training.vae import draw_clip, new_vae, normalise


def official_vae_names(state: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """diffusers' names back to the published ones."""
    names = list(vae_shapes(dim))
    # the converter only renames, so a number in place of each tensor shows where it went
    numbered = convert_wan_vae_to_diffusers({name: torch.tensor(i) for i, name in enumerate(names)})
    return {names[number.item()]: state[name] for name, number in numbered.items()}


def export_vae(folder: Path, side: int, clips: int = 48) -> Path:
    """Scale the latents and write folder/vae.safetensors; returns its path."""
    weights = read_weights(folder, "vae")
    dim = weights["encoder.conv_in.weight"].shape[0]
    model = new_vae(dim)
    model.load_state_dict(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    drawn = torch.stack([draw_clip(10_000_000 + seed, side, device) for seed in range(clips)])
    normalise(model, drawn.float() / 127.5 - 1)
    path = folder / "vae.safetensors"
    state = official_vae_names(model.state_dict(), dim)
    save_file({name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["vae"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    print(export_vae(options.folder, options.side))


if __name__ == "__main__":
    main()
