"""Contact sheets: many small pictures as one.

python -m training.world.sheet FILE      the classes, the mouths, the lights
"""

import sys
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from training.world.looks import GRADES, KINDS, LIGHTS, draw_look
from training.world.painter import paint
from training.world.pose import Pose

MOUTHS = (
    {},
    {"open": 1.0},
    {"open": 0.6, "wide": 1.0},
    {"open": 0.45, "round": 1.0},
    {"open": 0.2, "round": 1.0},
    {"open": 0.3, "wide": 0.7},
    {"smile": 1.0},
    {"blink": 1.0, "brow": 1.0},
    {"yaw": 1.0, "roll": 0.06, "open": 0.4},
    {"yaw": -1.0, "pitch": 1.0, "roll": -0.06},
    {"blink": 0.5},
    {"smile": 1.0, "open": 0.7, "wide": 0.6},
)


def contact_sheet(pictures: Tensor, columns: int) -> Image.Image:
    """(N, 3, H, W) in 0..1, row by row."""
    count, _, height, width = pictures.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    pixels = (pictures.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture.numpy()), (i % columns * width, i // columns * height))
    return sheet


def main(path: str, side: int = 128) -> None:
    columns = len(MOUTHS)
    poses = Pose.of(torch.cat([Pose.still(**mouth).rows() for mouth in MOUTHS]))
    rows = [paint(draw_look(seed, kind), Pose.still(), side, side) for kind in KINDS for seed in range(columns)]
    rows += [paint(draw_look(70 + seed, kind), poses, side, side) for seed, kind in enumerate(KINDS)]
    for seed, kind in enumerate(KINDS):
        look = draw_look(40 + seed, kind)
        lit = [replace(look, light=name) for name in LIGHTS] + [replace(look, grade=name) for name in GRADES[1:]]
        rows += [paint(changed, Pose.still(), side, side) for changed in lit]
    contact_sheet(torch.cat(rows), columns).save(path, quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:2])
