"""The picture a video was made from, and where mouth and other parts are in it: said, or found by a library.

Boxes are left, top, right, bottom in the pixels of the picture as it is on the disk. Beside `face.png` a file
`face.json` may hold {"mouth": box, "parts": {"eyes": box, ...}}; see PARTS for the names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from liveavatar_core.encoders.picture import cover
from liveavatar_core.errors import InputError
from liveavatar_core.evaluate.tracking import Box

# what is measured of a part
PARTS = {
    "head": ("growth", "stretch", "distortion"),
    "eyes": ("sharpness",),
    "hair": ("sharpness",),
    "prop": ("kept", "moved"),
    "background": ("kept", "moved"),
}


@dataclass(frozen=True, slots=True)
class Places:
    mouth: Box | None = None  # with closed lips
    parts: Mapping[str, Box] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reference:
    """At a video's size."""

    picture: Tensor  # (H, W, 3) in 8 bits
    places: Places


def load_picture(path: Path) -> Tensor:
    """(H, W, 3 or 4) in 0..1."""
    try:
        with Image.open(path) as file:
            return torch.from_numpy(numpy.asarray(file.convert("RGBA" if "A" in file.mode else "RGB")).copy()) / 255
    except OSError as error:
        raise InputError(f"the picture {path} cannot be read ({error})") from error


def places_of(path: Path, picture: Tensor, mouth: Box | None = None) -> Places:
    """What the JSON file beside the picture says; the mouth as given, else as there, else as found."""
    beside = places_beside(path)
    return Places(mouth or beside.mouth or find_mouth(picture), beside.parts)


def places_beside(path: Path) -> Places:
    """What the JSON file beside a picture says, if there is one."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return Places()
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
        mouth, parts = said.get("mouth"), said.get("parts", {})
        unknown = sorted({*parts} - {*PARTS})
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'{beside} is not {{"mouth": [left, top, right, bottom], "parts": {{...}}}} ({error})'
        ) from error
    if unknown:
        raise InputError(f"{beside} has a part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return Places(
        mouth and as_box(mouth, f"mouth in {beside}"),
        {name: as_box(box, f"{name} in {beside}") for name, box in parts.items()},
    )


def as_box(numbers: Sequence[object], name: str) -> Box:
    try:
        left, top, right, bottom = (float(number) for number in numbers)
        if left < right and top < bottom:
            return left, top, right, bottom
    except (TypeError, ValueError):
        pass
    raise InputError(f"the box of {name} is {numbers}; four numbers are needed: left, top, right, bottom")


def find_mouth(picture: Tensor) -> Box | None:
    """By mediapipe's face mesh, where a mediapipe is installed that has it; None without it or without a face."""
    try:
        mesh = import_module("mediapipe").solutions.face_mesh
    except (ImportError, AttributeError):
        return None
    height, width = picture.shape[:2]
    with mesh.FaceMesh(static_image_mode=True) as finder:
        found = finder.process((picture[..., :3] * 255).round().byte().numpy()).multi_face_landmarks
    if not found:
        return None
    spots = [found[0].landmark[i] for pair in mesh.FACEMESH_LIPS for i in pair]
    xs, ys = [spot.x * width for spot in spots], [spot.y * height for spot in spots]
    half, middle = 0.35 * (max(xs) - min(xs)), (min(ys) + max(ys)) / 2  # room for an open mouth
    return min(xs), middle - half, max(xs), middle + half


def at_size(picture: Tensor, places: Places, height: int, width: int) -> Reference:
    """As the pipeline prepares a picture: scaled to cover the video's size, cropped in the middle."""
    rows, columns = picture.shape[:2]
    scale = max(height / rows, width / columns)
    left, top = (columns * scale - width) / 2, (rows * scale - height) / 2

    def moved(name: str, box: Box) -> Box:
        edges = [edge * scale - cut for edge, cut in zip(box, (left, top, left, top), strict=True)]
        edges = [min(max(edge, 0.0), limit) for edge, limit in zip(edges, (width, height) * 2, strict=True)]
        if min(edges[2] - edges[0], edges[3] - edges[1]) < 0.02 * max(width, height):
            raise InputError(f"of the box of {name}, {box}, too little is left in a video of {width}x{height}")
        return tuple(edges)

    mouth = places.mouth and moved("mouth", places.mouth)
    parts = {name: moved(name, box) for name, box in places.parts.items()}
    fitted = (cover(picture, height, width) + 1) * 127.5
    return Reference(fitted.round().to(torch.uint8).permute(1, 2, 0), Places(mouth, parts))
