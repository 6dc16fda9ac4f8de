"""Figures of films as text, as lines of JSON, and as a page: what stands out, pictures side by side, plots, tables."""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from liveavatar_core.evaluate.measure import FIGURES, Moment, figure
from liveavatar_core.evaluate.places import Reference

_COLOURS = ("#1f6fb4", "#d9541e", "#2f8f4e", "#8a4fb0", "#a8801a", "#c23b78")
_SHOWN = 6  # pictures of a film at most
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;padding:0 1.5em;max-width:1280px;color:#222}
h2{margin-top:2em;border-bottom:2px solid #ddd}.film{display:flex;flex-wrap:wrap;gap:6px;margin:.4em 0 1em}
figure{margin:0}img{height:150px;display:block}figcaption{font-size:12px;color:#666}
.name{width:100%;font-size:13px}svg{background:#fafafa;margin:4px}table{border-collapse:collapse;font-size:13px}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #eee}td:first-child,td:nth-child(2){text-align:left}
.dot{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin:0 .3em 0 .9em}
dt{font-weight:bold;float:left;clear:left;width:8em}dd{margin-left:9em}
"""


@dataclass(frozen=True, slots=True)
class Film:
    """One measured video."""

    name: str
    reference: Reference
    moments: Sequence[Moment]
    kind: str = ""  # class of its picture
    variant: str = ""  # what it is compared by
    about: dict[str, str] = field(default_factory=dict)  # what else is known: sound, prompt


def as_lines(films: Iterable[Film]) -> Iterator[str]:
    """JSON, a line for each moment of each film."""
    for film in films:
        for moment in film.moments:
            about = {"video": film.name, "class": film.kind, "variant": film.variant, **film.about}
            yield json.dumps({**about, "start": moment.start, "figures": moment.figures}, ensure_ascii=False)


def as_text(films: Sequence[Film]) -> str:
    """A table for each class: a row for each figure and variant, a column for each time, means over the films."""
    blocks = []
    for kind, members in _grouped(films, "kind").items():
        head, rows = _table(members)
        rows = [head, *rows]
        if not any(film.variant for film in members):
            rows = [[row[0], *row[2:]] for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        blocks.append("\n".join([kind, *lines] if kind else lines))
    return "\n\n".join(blocks)


def differences(films: Sequence[Film]) -> list[str]:
    """In words, the largest first: what changed over time, and in what variants differ, by more than its step."""
    found = []
    for kind, members in _grouped(films, "kind").items():
        groups = _grouped(members, "variant")
        for name in _names(members):
            means = {variant: _mean(group, name) for variant, group in groups.items()}
            means = {variant: mean for variant, mean in means.items() if mean is not None}
            for variant, group in groups.items():
                change = _change(group, name)
                if change is not None:
                    first, last, seconds = change
                    where = " ".join(part for part in (kind, variant) if part)
                    text = f"{where}: " * bool(where) + f"{name} goes from {first:.3g} to {last:.3g} in {seconds:g} s"
                    found.append((abs(last - first) / figure(name).step, text))
            if len(means) > 1:
                least, most = min(means, key=means.get), max(means, key=means.get)
                text = (
                    f"{kind}: " * bool(kind)
                    + f"{name} is {means[most]:.3g} with {most}, {means[least]:.3g} with {least}"
                )
                found.append((abs(means[most] - means[least]) / figure(name).step, text))
    return [text for size, text in sorted(found, reverse=True) if size > 1]


def as_page(title: str, films: Sequence[Film]) -> str:
    """HTML in one file."""
    colours = dict(zip(_grouped(films, "variant"), _COLOURS * len(films), strict=False))
    named = [f"<li>{html.escape(text)}</li>" for text in differences(films)]
    parts = ["<h2>What stands out</h2>", f"<ul>{''.join(named)}</ul>" if named else "<p>Nothing.</p>"]
    if len(colours) > 1:
        parts += [f"<i class=dot style='background:{colours[name]}'></i>{html.escape(name)}" for name in colours]
    if any(film.kind or film.variant for film in films):
        parts.append(_overview(films))
    for kind, members in _grouped(films, "kind").items():
        parts.append(f"<h2>{html.escape(kind or 'Pictures and figures')}</h2>")
        parts += [_strip(film) for film in members]
        parts += [_plot(name, members, colours) for name in _names(members)]
        parts.append(_as_html(*_table(members)))
    meanings = (f"<dt>{name}</dt><dd>{html.escape(item.meaning)}</dd>" for name, item in FIGURES.items())
    parts.append(f"<h2>What the figures mean</h2><dl>{''.join(meanings)}</dl>")
    title = html.escape(title)
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
    return head + "".join(parts)


def _grouped(films: Iterable[Film], by: str) -> dict[str, list[Film]]:
    groups: dict[str, list[Film]] = {}
    for film in films:
        groups.setdefault(getattr(film, by), []).append(film)
    return groups


def _names(films: Iterable[Film]) -> list[str]:
    """Of all figures that any moment has, in the order they come."""
    return list(dict.fromkeys(name for film in films for moment in film.moments for name in moment.figures))


def _starts(films: Iterable[Film]) -> list[float]:
    return sorted({moment.start for film in films for moment in film.moments})


def _mean(films: Iterable[Film], name: str, start: float | None = None) -> float | None:
    """At one time or at all."""
    moments = [moment for film in films for moment in film.moments if start in (None, moment.start)]
    values = [moment.figures[name] for moment in moments if name in moment.figures]
    return sum(values) / len(values) if values else None


def _change(films: Sequence[Film], name: str) -> tuple[float, float, float] | None:
    """What it was first and last, over those films that last to the end, and the seconds between."""
    times = sorted({moment.start for film in films for moment in film.moments if name in moment.figures})
    lasting = [film for film in films if any(moment.start == times[-1] for moment in film.moments)] if times else []
    if len(times) < 2 or _mean(lasting, name, times[0]) is None:
        return None
    return _mean(lasting, name, times[0]), _mean(lasting, name, times[-1]), times[-1] - times[0]


def _table(films: Sequence[Film]) -> tuple[list[str], list[list[str]]]:
    """Its head and its rows: figure, variant, times, change."""
    starts = _starts(films)
    rows = []
    for name in _names(films):
        for variant, group in _grouped(films, "variant").items():
            means = [_mean(group, name, start) for start in starts]
            change = _change(group, name)
            change = "" if change is None else f"{change[1] - change[0]:+.3f}"
            rows.append([name, variant, *("" if mean is None else f"{mean:.3f}" for mean in means), change])
    return ["", "", *(f"{start:g} s" for start in starts), "change"], rows


def _overview(films: Sequence[Film]) -> str:
    """Means over all films and times, a line for each class and variant."""
    names = [name for name in _names(films) if name in FIGURES]
    rows = []
    for kind, members in _grouped(films, "kind").items():
        for variant, group in _grouped(members, "variant").items():
            means = (_mean(group, name) for name in names)
            rows.append([kind, variant, *("" if mean is None else f"{mean:.3g}" for mean in means)])
    return _as_html(["", "", *names], rows)


def _as_html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{cell}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _strip(film: Film) -> str:
    """The reference, and moments evenly from first to last."""
    count = min(_SHOWN, len(film.moments))
    chosen = [film.moments[round(i * (len(film.moments) - 1) / max(1, count - 1))] for i in range(count)]
    shown = [("reference", film.reference.picture), *((f"{moment.start:g} s", moment.picture) for moment in chosen)]
    pictures = "".join(f"<figure>{_image(p)}<figcaption>{caption}</figcaption></figure>" for caption, p in shown)
    said = " · ".join(filter(None, [film.name, film.variant, *film.about.values()]))
    return f"<div class=film><div class=name>{html.escape(said)}</div>{pictures}</div>"


def _image(picture: Tensor) -> str:
    stored = io.BytesIO()
    image = Image.fromarray(picture.cpu().numpy())
    image.thumbnail((480, 240))
    image.save(stored, "JPEG", quality=88)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}'>"


def _plot(name: str, films: Sequence[Film], colours: dict[str, str], width: int = 300, height: int = 150) -> str:
    """All films over time; the scale of time is logarithmic, so that seconds and minutes are both seen."""
    lines = [(film, [(m.start, m.figures[name]) for m in film.moments if name in m.figures]) for film in films]
    values = [value for _, line in lines for _, value in line]
    spread = max(max(values) - min(values), 2 * figure(name).step)
    low = (max(values) + min(values)) / 2 - 0.6 * spread
    last = max(start for _, line in lines for start, _ in line)
    left, top, right, bottom = 42, 40, width - 12, height - 24

    def at(start: float, value: float) -> str:
        x = left + (right - left) * math.log1p(start) / math.log1p(max(last, 1))
        return f"{x:.1f},{bottom - (bottom - top) * (value - low) / (1.2 * spread):.1f}"

    drawn = []
    for film, line in lines:
        points = [at(*point) for point in line]
        spots = "".join("<circle cx='{}' cy='{}' r='2.5'/>".format(*point.split(",")) for point in points)
        path = f"<polyline fill='none' stroke-width='1.6' points='{' '.join(points)}'/>"
        colour = colours[film.variant]
        drawn.append(f"<g stroke='{colour}' fill='{colour}'><title>{html.escape(film.name)}</title>{path}{spots}</g>")
    end = f"{last:g} s" if last else ""
    small = "font-size='10' fill='#666'"
    return (
        f"<svg width='{width}' height='{height}'><text x='8' y='16' font-weight='bold' font-size='13'>{name}</text>"
        f"<text x='8' y='30' {small}>{html.escape(figure(name).meaning)}</text>"
        f"<text x='4' y='{top + 8}' {small}>{low + 1.2 * spread:.3g}</text><text x='4' y='{bottom}' {small}>{low:.3g}"
        f"</text><text x='{left}' y='{height - 6}' {small}>0 s</text><text x='{right}' y='{height - 6}' {small} "
        f"text-anchor='end'>{end}</text><path d='M{left} {top}V{bottom}H{right}' fill='none' stroke='#bbb'/>"
        f"{''.join(drawn)}</svg>"
    )
