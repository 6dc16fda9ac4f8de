"""All figures of one video over its time, as numbers, as text, and as a page with plots and pictures."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from liveavatar_core.evaluate.footage import Window
from liveavatar_core.evaluate.pictures import (
    colour_shift,
    exposure,
    flicker,
    growth,
    histogram_overlap,
    likeness,
    sharpness,
    structure,
)
from liveavatar_core.evaluate.speech import agreement, loudness, opening

# what a figure is called, and in words what it says
MEANINGS = {
    "lips": "correlation of mouth opening and loudness",
    "lips late": "frames by which the mouth is late, where it fits best",
    "likeness": "cosine to the reference, 1 for the same",
    "colours": "share of the colour histogram in common with the reference",
    "structure": "SSIM outside the mouth, to the reference",
    "sharpness": "strongest edges over those of the reference",
    "brightness": "mean luma, 0 to 1",
    "clipped": "share of pixels at black or white",
    "colour shift": "distance of the mean colour from the reference, 8-bit steps",
    "flicker": "8-bit steps by which a pixel jumps to and fro",
    "growth": "size over that in the reference",
}

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Moment:
    """One window's figures, and its middle frame to look at."""

    start: float
    figures: dict[str, float]
    picture: Tensor  # (H, W, 3)


def measure(window: Window, reference: Tensor, mouth: Box | None) -> Moment:
    """`reference` (H, W, 3) in 8 bits, of the video's size; `mouth` is its box there, in px."""
    frames = window.frames
    where = None
    figures = {}
    if mouth is not None:
        left, top, right, bottom = (round(edge) for edge in mouth)
        where = torch.ones(frames.shape[1:3], dtype=torch.bool)
        where[top:bottom, left:right] = False
        if window.sound is not None:
            box = torch.tensor(mouth)
            opened = opening(frames, box[None], reference, box)
            sync = agreement(opened, loudness(window.sound, window.rate, len(frames), window.fps))
            figures |= {"lips": sync.correlation, "lips late": float(sync.lag)}
    brightness, clipped = exposure(frames)
    figures |= {
        "likeness": likeness(frames, reference).mean().item(),
        "colours": histogram_overlap(frames, reference).mean().item(),
        "structure": structure(frames, reference, where).mean().item(),
        "sharpness": sharpness(frames, reference).mean().item(),
        "brightness": brightness.mean().item(),
        "clipped": clipped.mean().item(),
        "colour shift": colour_shift(frames, reference).mean().item(),
        "flicker": flicker(frames),
        "growth": growth(frames, reference),
    }
    return Moment(window.start, figures, frames[len(frames) // 2])


def as_text(moments: Sequence[Moment]) -> str:
    """A table: a row for each figure, a column for each moment, and what changed from first to last."""
    rows = [["", *(f"{moment.start:.0f} s" for moment in moments), "change"]]
    for name in moments[0].figures:
        values = [moment.figures[name] for moment in moments]
        rows.append([name, *(f"{value:.3f}" for value in values), f"{values[-1] - values[0]:+.3f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def as_page(title: str, reference: Tensor, moments: Sequence[Moment]) -> str:
    """HTML in one file: pictures side by side, then every figure over time."""
    shown = [("reference", reference), *((f"{moment.start:.0f} s", moment.picture) for moment in moments)]
    strip = "".join(f"<figure>{_image(p)}<figcaption>{c}</figcaption></figure>" for c, p in shown)
    plots = "".join(_plot(name, moments) for name in moments[0].figures)
    title = html.escape(title)
    style = (
        "body{font:15px sans-serif;margin:2em;max-width:1200px}figure{display:inline-block;margin:4px}"
        "img{width:160px}svg{margin:8px;background:#fafafa}"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<div>{strip}</div>{plots}<pre>{html.escape(as_text(moments))}</pre>"
    )


def _image(picture: Tensor) -> str:
    stored = io.BytesIO()
    Image.fromarray(picture.cpu().numpy()).save(stored, "JPEG", quality=88)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}'>"


def _plot(name: str, moments: Sequence[Moment], width: int = 360, height: int = 150) -> str:
    values = [moment.figures[name] for moment in moments]
    low, high = min(values), max(values)
    spread = max(high - low, 0.02 * max(abs(high), abs(low)), 1e-3)
    low, high = (low + high - 1.2 * spread) / 2, (low + high + 1.2 * spread) / 2
    last = max(moments[-1].start, 1e-9)
    points = " ".join(
        f"{50 + (width - 65) * m.start / last:.1f},{height - 25 - (height - 60) * (v - low) / (high - low):.1f}"
        for m, v in zip(moments, values, strict=True)
    )
    return (
        f"<svg width='{width}' height='{height}'><text x='8' y='16' font-weight='bold'>{name}</text>"
        f"<text x='8' y='32' font-size='11' fill='#666'>{html.escape(MEANINGS[name])}</text>"
        f"<text x='4' y='48' font-size='10'>{high:.3g}</text>"
        f"<text x='4' y='{height - 22}' font-size='10'>{low:.3g}</text>"
        f"<text x='50' y='{height - 6}' font-size='10'>0 s</text>"
        f"<text x='{width - 50}' y='{height - 6}' font-size='10'>{last:.0f} s</text>"
        f"<polyline fill='none' stroke='#1f6fb4' stroke-width='2' points='{points}'/></svg>"
    )
