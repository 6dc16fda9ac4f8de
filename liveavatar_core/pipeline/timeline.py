"""The time line of a run as a picture: a row per stage, a box per hop with its block's number, coloured by step.

python -m liveavatar_core.pipeline.timeline run.json [picture.png]      draws what `Timeline.write` has kept
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from liveavatar_core.pipeline.monitor import DECODER, Monitor, Span
from liveavatar_core.pipeline.plan import PREFILL, Plan
from liveavatar_core.pipeline.timetable import ideal

if TYPE_CHECKING:
    from PIL import Image

WIDTH, ROW, GAP, MARGIN, LABEL, TICKS = 1600, 34, 10, 24, 90, 10
SHOWN = 8  # blocks in the parts that are drawn larger
STEPS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#ff9da6", "#9d755d")
SINK, COPY, PAPER, EMPTY, INK = "#555555", "#c8a200", "#ffffff", "#eeeeee", "#222222"


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened in one run, and what should have. `names[i]` is the row of the spans whose stage is i."""

    title: str
    names: tuple[str, ...]
    spans: tuple[Span, ...]
    ideal: tuple[Span, ...] = ()  # the same blocks, on a clock of their own

    @classmethod
    def of(cls, monitor: Monitor, plan: Plan, title: str, *, depth: int, reanchor: int | None) -> "Timeline":
        """Of a run, with the ideal one of hops and copies that take as long as these did. Arguments as for `ideal`."""
        count = len(plan.stages)
        spans = _rows(monitor.spans, count)
        blocks = 1 + max((span.block for span in spans), default=0)
        perfect = _perfect(plan, spans, blocks, depth=depth, reanchor=reanchor)
        return cls(title, (*(f"stage {i}" for i in range(count)), "VAE"), spans, tuple(perfect))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Timeline":
        content = json.loads(path.read_text(encoding="utf-8"))
        spans, ideal = (tuple(Span(**span) for span in content[name]) for name in ("spans", "ideal"))
        return cls(content["title"], tuple(content["names"]), spans, ideal)

    def picture(self) -> "Image.Image":
        """All of it; then its beginning and its end, each with the ideal below."""
        begin, end = _bounds(self.spans)
        close = min(end - begin, SHOWN * (end - begin) / (1 + max(span.block for span in self.spans)))
        lines = {"": self.spans} | ({", ideal": self.ideal} if self.ideal else {})
        parts = [self._part(f"{self.title}, all of it", self.spans, begin, end)]
        for name, spans in lines.items():
            first = _bounds(spans)[0]
            parts.append(self._part(f"{self.title}, the beginning{name}", spans, first, first + close))
        for name, spans in lines.items():
            last = _bounds(spans)[1]
            parts.append(self._part(f"{self.title}, the end{name}", spans, last - close, last))
        return _stacked(parts)

    def _part(self, title: str, spans: Sequence[Span], begin: float, end: float) -> "Image.Image":
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
        for span in spans:
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
            canvas.text((x(when) - 10, bottom), f"{when - _bounds(spans)[0]:.2f} s", fill=INK)
        return picture


def steady(plan: Plan, spans: Sequence[Span]) -> tuple[list[Span], float]:
    """The ideal of a stream that has neither beginning nor end, if hops take as long as in `spans`: what begins from
    time 0 on, the decoder's in the last row, and after how long it all comes again.
    """
    count, period = len(plan.stages), len(plan.rows[0])  # a ring takes as many blocks round as it has stages
    perfect = _perfect(plan, _rows(spans, count), 2 * period + plan.depth, depth=plan.depth, reanchor=None)
    hops, decoded = [[span for span in perfect if (span.stage == count) == last] for last in (False, True)]
    made = [span for span in hops if (span.stage, span.step) == plan.route()[-1]]
    again, seconds = [], 0.0
    for row, ends in ((hops, made), (decoded, decoded)):  # each on its own clock: the slower one sets the pace
        begin, end = ends[period - 1].end, ends[2 * period - 1].end
        again += [replace(s, begin=s.begin - begin, end=s.end - begin) for s in row if begin <= s.begin < end]
        seconds = max(seconds, end - begin)
    return again, seconds


def _rows(spans: Sequence[Span], count: int) -> tuple[Span, ...]:
    """With the decoder's in the row after `count` stages."""
    return tuple(replace(span, stage=count) if span.stage == DECODER else span for span in spans)


def _perfect(plan: Plan, spans: Sequence[Span], blocks: int, *, depth: int, reanchor: int | None) -> list[Span]:
    """`ideal` of hops and copies that take as long as these did."""

    def median(stage: int, kind: str, *, sink: bool = False) -> float:
        found = [s.seconds for s in spans if s.stage == stage and s.kind == kind and (s.step == PREFILL) == sink]
        return statistics.median(found or [0.0])

    hops = [median(stage.index, "compute") for stage in plan.stages]
    return ideal(
        plan,
        lambda stage, step: median(stage.index, "compute", sink=True) if step == PREFILL else hops[stage.index],
        blocks,
        depth=depth,
        copy=median(0, "copy"),
        decode=median(len(plan.stages), "compute"),
        reanchor=reanchor,
    )


def _bounds(spans: Sequence[Span]) -> tuple[float, float]:
    return min(span.begin for span in spans), max(span.end for span in spans)


def _stacked(parts: Sequence["Image.Image"]) -> "Image.Image":
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
