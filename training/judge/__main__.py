"""Judge a finished demo model on faces and voices it has not seen: a table, its numbers, a picture and a page.

    python -m training.judge --out DIR [--models models] [--quick] [--lines 0 1 2 3 4]

DIR gets figures.json, films.jpg (above what is right, below what was made) and report.html with plots over time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from liveavatar_core.demo.files import SHIPPED, DemoFiles
from liveavatar_core.errors import LiveAvatarError
from liveavatar_core.evaluate.report import Film, as_page
from training.judge.lines import QUICK, WHOLE, Row, kept, lasting, look, prompted, reference, talking, variants
from training.judge.role import Take
from training.speaker import Speaker
from training.world.sheet import contact_sheet

SHOWN = 8  # frames of a film


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="training.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=SHIPPED, help="as training.export writes them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one short film of each, for a CPU")
    parser.add_argument("--lines", type=int, nargs="+", choices=range(5), default=range(5))
    options = parser.parse_args(arguments)
    files = DemoFiles(options.models)
    if not files.exists:
        parser.error(f"{options.models} holds no finished model; python -m training.export all --to {options.models}")
    files.check()
    speaker = Speaker.load(files, "cuda" if torch.cuda.is_available() else "cpu")
    extent = QUICK if options.quick else WHOLE
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    films: list[Film] = []

    def tell(found: Sequence[Row]) -> None:
        rows.extend(found)
        print("\n".join(map(as_text, found)), flush=True)
        figures = {"about": files.about, "extent": asdict(extent), "rows": [asdict(row) for row in rows]}
        (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    if 0 in options.lines:
        tell(kept(speaker, extent))
    if 1 in options.lines:
        found, takes = talking(speaker, extent)
        tell(found)
        films += [Film(f"{take.role.video.kind} {i}", *measured(take)) for i, take in enumerate(takes)]
        draw(takes[:: extent.faces * extent.voices], options.out / "films.jpg")
    if 2 in options.lines:
        found, long = lasting(speaker, extent)
        tell(found)
        films += long
    if 3 in options.lines:
        tell(prompted(speaker, extent))
    if 4 in options.lines:
        tell(variants(speaker, extent))
    (options.out / "report.html").write_text(as_page("The demo model", films), encoding="utf-8")
    print(f"{sum(row.right for row in rows)} of {len(rows)} as wanted; {options.out}")


def measured(take: Take) -> tuple:
    return reference(take.role), [look(take)], take.role.video.kind


def as_text(row: Row) -> str:
    return f"{'  ' if row.right else '✗ '}{row.line:9}{row.what:52}{row.value:8.3f}  {row.wanted}"


def draw(takes: Sequence[Take], path: Path) -> None:
    pictures = []
    for take in takes:
        chosen = torch.linspace(0, len(take.frames) - 1, SHOWN).round().long()
        right = take.role.truth(take.first, len(take.frames))[chosen]
        pictures += [right, take.frames.cpu()[chosen]]
    contact_sheet(torch.cat(pictures).permute(0, 3, 1, 2) / 255, SHOWN).save(path, quality=90)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LiveAvatarError as error:
        sys.exit(str(error))
