"""Material for the bench: faces and voices that were kept for tests, with the boxes of what is to be measured.

python -m training.world.cases OUT [PICTURES_OF_A_CLASS] [SOUNDS] [SECONDS]

OUT/pictures/CLASS/*.png with *.json, OUT/sounds/*.wav and OUT/prompts.txt, as `python -m liveavatar_core.evaluate set`
takes them.
"""

import json
import sys
import wave
from pathlib import Path

import torch
from PIL import Image

from liveavatar_core.geometry import SAMPLE_RATE
from training.speech.sounds import sound
from training.world.looks import KINDS, Look, draw_look
from training.world.painter import paint
from training.world.pose import Pose, eyes_box, head_centre, mouth_box

SIDE = 256
PROMPTS = """portrait: A person is talking to the camera, soft studio lighting, photorealistic portrait
anime: An anime girl is talking to the camera, natural daylight, anime style
game: A cheerful dwarf laughing heartily, warm lighting, Blizzard cinematics style
"""
# middle and half sizes, in head sizes; of what is held or stands beside the shoulder
_PROPS = {
    "staff": (1.25, 0.2, 0.30, 1.0),
    "plant": (1.40, 0.9, 0.40, 0.6),
    "hammer": (1.20, 0.6, 0.40, 0.8),
    "shield": (1.02, 1.7, 0.56, 0.5),
    "mug": (1.20, 1.75, 0.40, 0.3),
}


def boxes(look: Look, side: int = SIDE) -> dict:
    """What the JSON file beside a picture of the look holds."""

    def in_pixels(x: float, y: float, a: float, b: float) -> list[float]:
        edges = ((x - a + 1) / 2, (y - b + 1) / 2, (x + a + 1) / 2, (y + b + 1) / 2)
        return [round(side * min(1.0, max(0.0, edge)), 1) for edge in edges]

    still = Pose.still()
    x, y = (place.item() for place in head_centre(look, still))
    size = look.size
    parts = {
        "head": in_pixels(x, y, 0.9 * size, 1.05 * size),
        "eyes": in_pixels(*eyes_box(look, still)[0].tolist()),
        "hair": in_pixels(x, y - 0.78 * size, 0.8 * size, 0.35 * size),
        "background": in_pixels(-0.7, -0.75, 0.3, 0.25),
    }
    if look.prop:
        across, down, half_width, half_height = _PROPS[look.prop]
        right = look.x + (1 if look.seed % 2 else -1) * across * size
        parts["prop"] = in_pixels(right, look.y - 0.12 + down * size, half_width * size, half_height * size)
    return {"mouth": in_pixels(*mouth_box(look, still)[0].tolist()), "parts": parts}


def draw(folder: Path, kind: str, count: int) -> None:
    """The first held-out faces of a class, and their boxes."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        look = draw_look(seed, kind, held_out=True)
        pixels = (paint(look, Pose.still(), SIDE, SIDE)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / kind / f"{kind}-{seed}.png")
        (folder / kind / f"{kind}-{seed}.json").write_text(json.dumps(boxes(look)), encoding="utf-8")


def main(out: Path, pictures: int = 3, sounds: int = 2, seconds: float = 12.0) -> None:
    for kind in KINDS:
        draw(out / "pictures", kind, pictures)
    (out / "sounds").mkdir(exist_ok=True)
    for seed in range(sounds):
        samples = sound(seed, seconds, held_out=True).samples
        with wave.open(str(out / "sounds" / f"voice-{seed}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", ""))
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    (out / "prompts.txt").write_text(PROMPTS, encoding="utf-8")


if __name__ == "__main__":
    out, *counts = sys.argv[1:]
    main(Path(out), *map(int, counts))
