"""Draws the pictures and speaks speech.wav: what the workflows start from, made by the project itself.

    python -m assets.make_assets        (needs Pillow and torch; and espeak-ng on the PATH for the speech)

portrait.png and what is cut from it is drawn here, anime.jpg and game_character.jpg are faces of training/world.

Shapes are smooth closed curves through a few points, in pixels of the finished portrait; left-right symmetric ones are
given by their right half. Everything is drawn four times larger and scaled down, which is the antialiasing.
"""

import shutil
import subprocess
import wave
from array import array
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from training.world.looks import draw_look
from training.world.painter import paint
from training.world.pose import Pose
from training.world.sheet import contact_sheet

HERE = Path(__file__).parent
WIDTH, HEIGHT = 704, 384  # the shape the model is used at most
AXIS = WIDTH / 2
SCALE = 4
BANNER = (1260, 540)
BANNER_WORDS = [("Wan Live Avatar", 78, 96), ("A portrait, speech and a prompt become", 30, 214),
                ("a talking video, shown while it is made", 30, 256)]  # fmt: skip
CHARACTERS = [("anime.jpg", "anime", 16), ("game_character.jpg", "game", 13)]  # the demo model has not seen them
THUMBNAIL = 480
TEMPLATES = [("portrait", "portrait.png", "Portrait", {}), ("anime", "anime.jpg", "Anime", {}),
             ("game_character", "game_character.jpg", "Game character", {}),
             ("long_video", "portrait.png", "Long video", {"count": 5}),
             ("low_memory", "portrait.png", "Low memory", {"dim": 0.45}),
             ("many_gpus", "portrait.png", "Many GPUs", {"count": 2}),
             ("headless", "portrait.png", "python, curl | ffplay", {"dim": 0.7}),
             ("demo", "anime.jpg", "Demo", {"dim": 0.25})]  # fmt: skip
SENTENCE = "Hello! I am a drawing, and a computer speaks for me. Nice to meet you."

Point = tuple[float, float]

SKIN, SHADE, BLUSH = (240, 197, 168), (219, 165, 135), (233, 150, 130)
HAIR, HAIR_LIGHT = (74, 46, 38), (110, 70, 54)
SHIRT, SHIRT_DARK = (38, 110, 122), (28, 86, 98)
LIP, LIP_DARK = (196, 92, 88), (150, 58, 60)
IRIS, INK, WHITE = (70, 116, 98), (43, 30, 30), (252, 250, 247)
WALL, WALL_LIGHT = (196, 214, 212), (240, 238, 226)


def curve(points: list[Point], steps: int = 16) -> list[Point]:
    """A closed Catmull-Rom curve through the points."""
    smooth = []
    for i in range(len(points)):
        p0, p1, p2, p3 = (points[(i + k) % len(points)] for k in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            smooth.append(tuple(
                0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
                for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
            ))  # fmt: skip
    return smooth


def symmetric(right: list[Point]) -> list[Point]:
    """The closed outline whose right half, top to bottom, is given as offsets from the axis."""
    return [(AXIS + x, y) for x, y in right] + [(AXIS - x, y) for x, y in reversed(right) if x]


def mirrored(points: list[Point]) -> list[list[Point]]:
    """A shape given on the right side as offsets from the axis, and its twin on the left."""
    return [[(AXIS + x, y) for x, y in points], [(AXIS - x, y) for x, y in points]]


class Canvas:
    """A picture of WIDTH x HEIGHT that is drawn on at SCALE times the size."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture

    def shape(self, outline: list[Point], color: tuple[int, int, int], blur: float = 0, opacity: float = 1) -> None:
        mask = Image.new("L", self.picture.size)
        big = [(x * SCALE, y * SCALE) for x, y in curve(outline)]
        ImageDraw.Draw(mask).polygon(big, fill=round(255 * opacity))
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * SCALE))
        self.picture.paste(color, mask=mask)

    def circle(self, x: float, y: float, radius: float, color: tuple[int, int, int], **soft: float) -> None:
        half = radius * 2**-0.5
        ring = [(radius, 0), (half, half), (0, radius), (-half, half)]
        ring += [(-a, -b) for a, b in ring]
        self.shape([(x + a, y + b) for a, b in ring], color, **soft)

    def finished(self) -> Image.Image:
        return self.picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_portrait() -> Canvas:
    canvas = Canvas(Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), WALL))
    draw_room(canvas)
    draw_back_hair(canvas)
    draw_body(canvas)
    draw_head(canvas)
    draw_eyes(canvas)
    draw_nose_and_mouth(canvas)
    draw_front_hair(canvas)
    return canvas


def draw_room(canvas: Canvas) -> None:
    canvas.circle(AXIS, 150, 250, WALL_LIGHT, blur=70)
    for x, y, radius, color in [(96, 300, 90, (150, 186, 176)), (640, 320, 100, (160, 192, 184)),
                                (84, 80, 44, (250, 232, 196)), (622, 96, 56, (246, 222, 190))]:  # fmt: skip
        canvas.circle(x, y, radius, color, blur=14, opacity=0.8)


def draw_back_hair(canvas: Canvas) -> None:
    canvas.shape(symmetric([(0, 42), (52, 54), (84, 104), (90, 170), (98, 236), (86, 282), (50, 292), (0, 288)]), HAIR)


def draw_body(canvas: Canvas) -> None:
    canvas.shape(symmetric([(0, 282), (44, 286), (104, 306), (142, 336), (158, 400), (80, 430), (0, 430)]), SHIRT)
    neck = symmetric([(0, 220), (30, 224), (32, 262), (46, 284), (32, 304), (0, 318)])
    canvas.shape(neck, SKIN)
    canvas.shape(symmetric([(0, 226), (26, 226), (27, 250), (18, 262), (0, 268)]), SHADE, blur=2)
    for collar in mirrored([(50, 276), (60, 292), (34, 330), (2, 350), (12, 326), (36, 304)]):
        canvas.shape(collar, SHIRT_DARK)


def draw_head(canvas: Canvas) -> None:
    for ear in mirrored([(62, 152), (74, 148), (76, 166), (70, 184), (60, 186)]):
        canvas.shape(ear, SHADE)
    canvas.shape(symmetric([(0, 72), (40, 80), (64, 116), (66, 164), (56, 206), (32, 238), (0, 250)]), SKIN)
    for cheek in (-1, 1):
        canvas.circle(AXIS + cheek * 40, 196, 13, BLUSH, blur=7, opacity=0.55)


def draw_eyes(canvas: Canvas) -> None:
    for brow in mirrored([(13, 138), (26, 131), (44, 129), (53, 134), (43, 133), (27, 136)]):
        canvas.shape(brow, HAIR)
    for eye in mirrored([(14, 161), (21, 154), (31, 151), (41, 155), (47, 161), (39, 168), (29, 170), (20, 167)]):
        canvas.shape(eye, WHITE)
    for side in (-1, 1):
        x = AXIS + side * 30
        canvas.circle(x, 160.5, 8.6, IRIS)
        canvas.circle(x, 160.5, 4.2, INK)
        canvas.circle(x + 2.6, 157.4, 2.0, WHITE)
    for lid in mirrored(
        [(12, 162), (20, 152.5), (31, 148.5), (42, 152.5), (51, 159), (42, 156.5), (31, 153), (21, 156)]
    ):
        canvas.shape(lid, INK)


def draw_nose_and_mouth(canvas: Canvas) -> None:
    canvas.shape(symmetric([(0, 190), (7, 192), (11, 197), (6, 201), (0, 203)]), SHADE, blur=1.5, opacity=0.85)
    canvas.shape(symmetric([(0, 166), (3, 176), (4, 190), (0, 194)]), (248, 212, 186), blur=2)
    canvas.shape(symmetric([(0, 216), (5, 214), (14, 214.5), (27, 213.5), (18, 223), (8, 229), (0, 230.5)]), LIP)
    canvas.shape(symmetric([(0, 219.5), (12, 218.4), (24, 214.4), (14, 222), (6, 224), (0, 224.6)]), WHITE)
    canvas.shape(symmetric([(0, 219), (12, 217.8), (25, 214), (12, 219.2), (0, 220.6)]), LIP_DARK)
    canvas.shape(symmetric([(0, 226.6), (7, 226), (5, 228), (0, 228.6)]), (222, 128, 120), blur=0.8)
    canvas.shape(symmetric([(0, 237), (9, 236.5), (0, 240)]), SHADE, blur=1.5, opacity=0.6)


def draw_front_hair(canvas: Canvas) -> None:
    parting = AXIS - 16
    left = [(parting, 62), (AXIS - 34, 92), (AXIS - 56, 122), (AXIS - 66, 160), (AXIS - 72, 214), (AXIS - 88, 246),
            (AXIS - 90, 170), (AXIS - 82, 104), (AXIS - 52, 58)]  # fmt: skip
    right = [(parting, 58), (AXIS + 16, 96), (AXIS + 50, 122), (AXIS + 66, 160), (AXIS + 72, 214), (AXIS + 88, 246),
             (AXIS + 90, 170), (AXIS + 84, 104), (AXIS + 54, 52), (AXIS + 8, 42)]  # fmt: skip
    canvas.shape(left, HAIR)
    canvas.shape(right, HAIR)
    shine = [(AXIS + 14, 62), (AXIS + 44, 74), (AXIS + 66, 108), (AXIS + 72, 136), (AXIS + 58, 104), (AXIS + 36, 80)]
    canvas.shape(shine, HAIR_LIGHT, blur=2.5, opacity=0.8)
    shine = [(AXIS - 48, 72), (AXIS - 66, 98), (AXIS - 74, 134), (AXIS - 62, 108)]
    canvas.shape(shine, HAIR_LIGHT, blur=2.5, opacity=0.8)


def draw_banner(portrait: Canvas, speech: Path) -> Image.Image:
    """21:9, for the registry: the portrait, the name, and the speech as bars of its loudness."""
    width, height = BANNER
    banner = Image.new("RGB", BANNER, SHIRT_DARK)
    left, side = (AXIS - 192) * SCALE, HEIGHT * SCALE
    face = portrait.picture.crop((round(left), 0, round(left) + side, side))
    banner.paste(face.resize((height, height), Image.Resampling.LANCZOS))
    draw, margin = ImageDraw.Draw(banner), height + 60
    for text, size, y in BANNER_WORDS:
        draw.text((margin, y), text, fill=WHITE, font=ImageFont.load_default(size))
    for i, loud in enumerate(loudness(speech, bars := 48)):
        x, half = margin + i * (width - margin - 60) / bars, 4 + 64 * loud
        draw.rounded_rectangle((x, 440 - half, x + 6, 440 + half), 3, fill=WALL if i < bars / 2 else SHIRT)
    return banner


def draw_character(kind: str, seed: int, side: int = 512) -> Image.Image:
    twice = paint(draw_look(seed, kind, held_out=True), Pose.still(smile=0.4), 2 * side, 2 * side)
    return contact_sheet(torch.nn.functional.avg_pool2d(twice, 2), 1)


def draw_thumbnail(face: Image.Image, words: str, count: int = 1, dim: float = 0) -> Image.Image:
    """A workflow's picture in the list of templates: the face, `count` times side by side, and what it is for."""
    side, band = THUMBNAIL, 72
    face = Image.blend(face, Image.new("RGB", face.size, INK), dim).resize((side, side), Image.Resampling.LANCZOS)
    thumbnail = Image.new("RGB", (side, side), SHIRT_DARK)
    strip, gap = side // count, 6 if count > 1 else 0
    for i in range(count):
        left = (side - strip + gap) // 2 if count > 2 else i * strip
        thumbnail.paste(face.crop((left, 0, left + strip - gap, side)), (i * strip, 0))
    draw = ImageDraw.Draw(thumbnail)
    draw.rectangle((0, side - band, side, side), fill=SHIRT_DARK)
    draw.text((side / 2, side - band / 2), words, fill=WHITE, font=ImageFont.load_default(34), anchor="mm")
    return thumbnail


def loudness(path: Path, parts: int) -> list[float]:
    """The peak of each part of a 16-bit sound, the loudest as 1."""
    with wave.open(str(path)) as file:
        samples = array("h", file.readframes(file.getnframes()))
    size = len(samples) // parts
    peaks = [max(abs(sample) for sample in samples[i * size : (i + 1) * size]) for i in range(parts)]
    return [peak / max(peaks) for peak in peaks]


def speak(path: Path) -> None:
    if shutil.which("espeak-ng") is None:
        print(f"espeak-ng is not installed; {path.name} is left as it is.")
        return
    subprocess.run(["espeak-ng", "-v", "en-us+f3", "-s", "165", "-w", str(path), SENTENCE], check=True)


if __name__ == "__main__":
    canvas = draw_portrait()
    portrait = canvas.finished()
    portrait.save(HERE / "portrait.png", optimize=True)
    face = portrait.crop((AXIS - 140, 24, AXIS + 140, 304))
    face.resize((256, 256), Image.Resampling.LANCZOS).save(HERE / "icon.png", optimize=True)
    speak(HERE / "speech.wav")
    draw_banner(canvas, HERE / "speech.wav").save(HERE / "banner.png", optimize=True)
    for name, kind, seed in CHARACTERS:
        draw_character(kind, seed).save(HERE / name, quality=90, subsampling=0)
    for name, picture, words, look in TEMPLATES:
        whole = Image.open(HERE / picture).convert("RGB")
        left = (whole.width - whole.height) // 2
        face = whole.crop((left, 0, left + whole.height, whole.height))
        draw_thumbnail(face, words, **look).save(HERE.parent / "workflows" / f"{name}.jpg", quality=88)
