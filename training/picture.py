"""The README's moving picture: faces that no model has seen, one of each class, say the README's words.

    python -m training.picture assets/talking.webp [--models models] [--seed 0]

The ending chooses the format: .webp, or .gif, which is larger and has fewer colours.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from liveavatar_core.demo.files import SHIPPED, DemoFiles
from liveavatar_core.geometry import DEFAULT_FPS, SAMPLE_RATE, frames_for
from liveavatar_core.io.sound import load_sound, to_speech
from training.judge.role import PROMPTS
from training.sizes import SIDE
from training.speaker import Speaker
from training.world.looks import KINDS, draw_look
from training.world.painter import paint
from training.world.pose import Pose

SPEECH = Path(__file__).parent.parent / "assets" / "speech.wav"
EVERY = 2  # frames, of which one is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--models", type=Path, default=SHIPPED)
    parser.add_argument("--seed", type=int, default=0, help="which unseen faces")
    options = parser.parse_args()
    files = DemoFiles(options.models)
    files.check()
    speaker = Speaker.load(files, "cuda" if torch.cuda.is_available() else "cpu")
    samples = to_speech(*load_sound(SPEECH))
    frames = frames_for(len(samples) / SAMPLE_RATE, DEFAULT_FPS)
    films = []
    for kind in KINDS:
        still = paint(draw_look(options.seed, kind, held_out=True), Pose.still(), SIDE, SIDE)[0]
        films.append(speaker.film(still, samples, PROMPTS[kind], frames)[::EVERY])
        print(f"{kind}: {frames} frames", flush=True)
    first, *rest = (Image.fromarray(picture.numpy()) for picture in torch.cat(films, 2))
    milliseconds = 1000 * EVERY // DEFAULT_FPS
    first.save(options.path, save_all=True, append_images=rest, duration=milliseconds, loop=0, quality=80)
    print(f"{options.path}: {options.path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
