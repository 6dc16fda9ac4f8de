"""Measure finished videos.

  python -m liveavatar_core.evaluate video VIDEO --reference PICTURE [--mouth LEFT TOP RIGHT BOTTOM] [--report FILE]
  python -m liveavatar_core.evaluate set WORKFLOW.json --server URL --pictures DIR --sounds DIR --prompts FILE --out DIR

`set` has a running ComfyUI make a video of every picture with every sound and prompt, keeps them in DIR, and measures
them. Pictures lie in folders named as their class; a prompt is a line of the file, "anime: A girl talks" for one
class. What is there is not made again. Boxes are left, top, right, bottom in the picture's pixels; beside `face.png`,
`face.json` may hold {"mouth": box, "parts": {"head": box, "eyes": box, "hair": box, "prop": box, "background": box}}.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from liveavatar_core.client.workflow import patch, read, settings
from liveavatar_core.errors import LiveAvatarError
from liveavatar_core.evaluate.cases import ABLATIONS, cases
from liveavatar_core.evaluate.make import make
from liveavatar_core.evaluate.measure import TIMES, measure_video
from liveavatar_core.evaluate.places import Places, as_box, load_picture, places_of
from liveavatar_core.evaluate.report import Film, as_lines, as_page, as_text, differences


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    films = options.films(options)
    print(as_text(films))
    for text in differences(films):
        print(text)
    if options.report is not None:
        options.report.write_text(as_page(options.title, films), encoding="utf-8")
    if options.figures is not None:
        options.figures.write_text("".join(f"{line}\n" for line in as_lines(films)), encoding="utf-8")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liveavatar_core.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="video|set")
    video = commands.add_parser("video", help="measure one video")
    video.add_argument("video", type=Path)
    video.add_argument("--reference", type=Path, required=True, metavar="PICTURE", help="what it was made from")
    video.add_argument("--mouth", type=float, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"))
    video.add_argument("--report", type=Path, metavar="FILE", help="an HTML page with plots and pictures")
    video.add_argument("--figures", type=Path, metavar="FILE", help="a line of JSON for each window")
    video.set_defaults(films=one_film)
    many = commands.add_parser("set", help="have the videos of a set made, and measure them")
    many.add_argument("workflow", type=Path, help="in API form, as those in workflows/api/")
    many.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    many.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="holds a folder for each class")
    many.add_argument("--sounds", type=Path, required=True, metavar="DIR")
    many.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line")
    many.add_argument("--out", type=Path, required=True, metavar="DIR", help="videos, report.html, figures.jsonl")
    many.add_argument(
        "--ablation",
        choices=ABLATIONS,
        help="prompt: up to the first comma against all of it; size and steps: those of the presets, compared",
    )
    many.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="as the client takes it")
    many.set_defaults(films=set_of_films)
    for command in (video, many):
        command.add_argument(
            "--at", type=float, nargs="+", default=TIMES, metavar="SECONDS", help="when to look; default: %(default)s"
        )
    options = parser.parse_args(arguments)
    if options.films is set_of_films:
        options.report, options.figures = options.out / "report.html", options.out / "figures.jsonl"
    options.title = options.out.name if options.films is set_of_films else options.video.name
    return options


def one_film(options: argparse.Namespace) -> list[Film]:
    picture, places = known(options.reference, options.mouth)
    return [Film(options.video.name, *measure_video(options.video, picture, places, options.at))]


def set_of_films(options: argparse.Namespace) -> list[Film]:
    workflow = read(options.workflow)
    workflow = patch(workflow, {(node_id, name): value for node_id, name, _, value in settings(workflow, options.set)})
    wanted = cases(workflow, options.pictures, options.sounds, options.prompts, options.out, options.ablation)
    pictures = {picture: known(picture) for picture in dict.fromkeys(case.picture for case in wanted)}
    asyncio.run(make(wanted, options.server, say))
    films = []
    for case in wanted:
        if case.video.is_file():
            say(f"measuring {case.video.name}")
            measured = measure_video(case.video, *pictures[case.picture], options.at)
            about = {"picture": case.picture.name, "sound": case.sound.name, "prompt": case.prompt}
            films.append(Film(case.video.stem, *measured, case.kind, case.variant, about))
    if not films:
        raise LiveAvatarError("none of the videos could be made; the reasons are above")
    return films


def known(path: Path, mouth: Sequence[float] | None = None) -> tuple[Tensor, Places]:
    picture = load_picture(path)
    places = places_of(path, picture, mouth and as_box(mouth, "--mouth"))
    if places.mouth is None:
        say(
            f"the lips of {path} are not measured, for where its mouth is is not known: give --mouth, or a file "
            f'{path.with_suffix(".json").name} beside it with {{"mouth": [left, top, right, bottom]}}, or install a '
            "mediapipe that still has solutions.face_mesh"
        )
    return picture, places


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (LiveAvatarError, OSError) as error:
        sys.exit(str(error))
