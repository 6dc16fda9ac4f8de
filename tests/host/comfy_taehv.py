"""Runs ComfyUI's own TAEHV in a process of its own, for comparison: comfy_taehv.py TREE WEIGHTS IN OUT.

IN holds "latents" (16, t, h, w) as the network wants them; OUT gets its "frames" (n, 3, H, W). WEIGHTS is a file of
TAEHV's whole state; everything is computed in float64.
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(tree: str, weights: Path, given: Path, made: Path) -> None:
    sys.path.insert(0, tree)
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.taesd.taehv import TAEHV

    model = TAEHV(latent_channels=16).double()
    model.load_state_dict(load_file(weights))
    frames = model.decode(load_file(given)["latents"].double()[None])[0]
    save_file({"frames": frames.transpose(0, 1).contiguous()}, made)


main(sys.argv[1], *map(Path, sys.argv[2:5]))
