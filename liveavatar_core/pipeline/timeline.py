"""The time line of a run as a picture: a row per stage, a box per hop with its block's number, coloured by step.

python -m liveavatar_core.pipeline.timeline run.json [picture.png]      draws what `Timeline.write` has kept
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from liveavatar_core.pipeline.monitor import Span
from liveavatar_core.pipeline.plan import PREFILL

if TYPE_CHECKING:
    from PIL import Image

WIDTH, ROW, GAP, MARGIN, LABEL, TICKS = 1600, 34, 10, 24, 90, 10
STEPS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#ff9da6", "#9d755d")
SINK, COPY, PAPER, EMPTY, INK = "#555555", "#c8a200", "#ffffff", "#eeeeee", "#222222"


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened in one run. `names[i]` is the row of the spans whose stage is i."""

    title: str
    names: tuple[str, ...]
    spans: tuple[Span, ...]

    def write(self, path: Path) -> None:
        content = {"title": self.title, "names": self.names, "spans": [astuple(span) for span in self.spans]}
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Timeline":
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["title"], tuple(content["names"]), tuple(Span(*span) for span in content["spans"]))

    def picture(self) -> "Image.Image":
        """Three parts one below the other: all of it, its first blocks, and as much of its end."""
        begin, end = min(span.begin for span in self.spans), max(span.end for span in self.spans)
        close = min(end - begin, 6 * (end - begin) / (1 + max(span.block for span in self.spans)))
        return stacked(
            [
                self.part(f"{self.title}: all of it", begin, end),
                self.part(f"{self.title}: the start", begin, begin + close),
                self.part(f"{self.title}: the end", end - close, end),
            ]
        )

    def part(self, title: str, begin: float, end: float) -> "Image.Image":
        """What lies between `begin` and `end`, in seconds."""
        from PIL import Image, ImageDraw  # comes with ComfyUI; the engine itself does without

        bottom = MARGIN + len(self.names) * (ROW + GAP)
        picture = Image.new("RGB", (WIDTH, bottom + MARGIN), PAPER)
        canvas = ImageDraw.Draw(picture)
        scale = (WIDTH - LABEL - MARGIN) / (end - begin)

        def x(when: float) -> float:
            return LABEL + (min(max(when, begin), end) - begin) * scale

        canvas.text((MARGIN, 6), title, fill=INK)
        for i, name in enumerate(self.names):
            top = MARGIN + i * (ROW + GAP)
            canvas.text((6, top + ROW // 3), name, fill=INK)
            canvas.rectangle((LABEL, top, WIDTH - MARGIN, top + ROW), fill=EMPTY)
        for span in self.spans:
            left, right = x(span.begin), x(span.end)
            top = MARGIN + span.stage * (ROW + GAP)
            if span.end < begin or span.begin > end:
                continue
            if span.kind == "copy":
                canvas.rectangle((left, top + ROW + 2, max(left + 1, right), top + ROW + 5), COPY)
                continue
            colour = SINK if span.step == PREFILL else STEPS[span.step % len(STEPS)]
            canvas.rectangle((left, top, right, top + ROW), colour, outline=PAPER if right - left > 4 else None)
            text = "sink" if span.step == PREFILL else str(span.block)
            if canvas.textlength(text) + 4 < right - left:
                canvas.text((left + 3, top + ROW // 3), text, fill=PAPER)
        for tick in range(TICKS + 1):
            when = begin + tick * (end - begin) / TICKS
            canvas.text((x(when) - 10, bottom), f"{when - self.spans[0].begin:.2f} s", fill=INK)
        return picture


def stacked(parts: Sequence["Image.Image"]) -> "Image.Image":
    from PIL import Image

    whole = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


if __name__ == "__main__":
    source = Path(sys.argv[1])
    Timeline.read(source).picture().save(sys.argv[2] if len(sys.argv) > 2 else source.with_suffix(".png"))
