"""`python run.py demo`: a picture and a sound through the demo workflow, in a ComfyUI that lives as long as the run."""

import argparse
import asyncio
import os
import signal
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from liveavatar_core.client.workflow import Progress, patch, read
from liveavatar_core.errors import LiveAvatarError

from . import ROOT, LaunchError

WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
PICTURE, SPEECH = ROOT / "assets" / "anime.jpg", ROOT / "assets" / "speech.wav"
OUT = ROOT / "out"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py demo", description="Make a talking video with the demo model.")
    parser.add_argument("--image", type=Path, default=PICTURE, metavar="FILE", help="portrait; default: %(default)s")
    parser.add_argument("--audio", type=Path, default=SPEECH, metavar="FILE", help="speech; default: %(default)s")
    parser.add_argument("--prompt", metavar="TEXT", help="what the picture shows; default: the workflow's")
    parser.add_argument("--seconds", type=float, metavar="N", help="use only the first N seconds of the speech")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the mp4 goes; default: a new file in out/")
    parser.add_argument("--port", type=int, metavar="P", help="port of the server; default: a free one")
    parser.add_argument("--open", action="store_true", help="leave ComfyUI running and open it in a browser")
    options = parser.parse_args(arguments)
    for name in ("image", "audio"):
        path = getattr(options, name).expanduser().resolve()
        if not path.is_file():
            raise LaunchError(f"--{name} {getattr(options, name)} is not a file.")
        setattr(options, name, path)
    if options.seconds is not None and not options.seconds > 0:
        raise LaunchError(f"--seconds {options.seconds:g} must be more than 0.")
    options.out = (options.out or OUT / time.strftime("liveavatar-%Y%m%d-%H%M%S.mp4")).expanduser().resolve()
    return options


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The options back in the form `parse` takes, with absolute paths: the demo runs in another folder."""
    given = {name: value for name, value in vars(options).items() if value not in (None, False)}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


async def make_video(url: str, options: argparse.Namespace) -> Path:
    from liveavatar_core.client.connection import Client

    start = time.monotonic()
    async with Client(url) as client:
        values: dict[tuple[str, str], object] = {
            ("LoadImage", "image"): await client.upload(options.image),
            ("LoadAudio", "audio"): await client.upload(options.audio),
        }
        if options.prompt is not None:
            values["LiveAvatar_PromptConditioner", "text"] = options.prompt
        if options.seconds is not None:
            values["LiveAvatar_AudioEncoder", "seconds"] = options.seconds
        workflow = patch(read(WORKFLOW), values)
        progress = Progress(workflow)

        def show(kind: str, data: dict) -> None:
            for news in progress.news(kind, data):
                print(f"  {news}  ({time.monotonic() - start:.1f} s)", flush=True)

        outputs = await client.run(workflow, show)
        files = [file for output in outputs.values() for file in output.get("images", [])]
        videos = [file for file in files if file["filename"].endswith(".mp4")]
        if not videos:
            raise LaunchError("The workflow ended without an mp4 file.")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(await client.fetch(videos[0]))
    return options.out


def describe(path: Path) -> str:
    """Frames and lengths as the file itself has them."""
    import av

    with av.open(str(path)) as file:
        picture, sound = file.streams.video[0], next(iter(file.streams.audio), None)
        frames = sum(packet.size > 0 for packet in file.demux(picture))
        rate = float(picture.average_rate)
        text = f"{picture.width}x{picture.height}, {frames} frames at {rate:g} per second, {frames / rate:.2f} s"
        return text + (f", sound {float(sound.duration * sound.time_base):.2f} s" if sound else ", no sound")


def run(options: argparse.Namespace) -> None:
    from .comfy import PACK, Comfy

    start = time.monotonic()
    print("Starting ComfyUI", flush=True)
    keep = ["--output-directory", str(OUT)] if options.open else []
    OUT.mkdir(exist_ok=True)
    tree = Path(os.environ["LIVEAVATAR_COMFYUI"])
    with Comfy(tree, port=options.port, log=OUT / "comfyui.log", arguments=keep) as server:
        print(f"ComfyUI is ready at {server.url} ({time.monotonic() - start:.0f} s); making the video", flush=True)
        path = asyncio.run(make_video(server.url, options))
        print(f"{path}\n{describe(path)}", flush=True)
        if options.open:
            page = f"{server.url}/?template=demo&source={PACK}"
            print(f"Opening {page}\nResults go to {OUT}; press Ctrl-C here to stop ComfyUI.", flush=True)
            webbrowser.open(page)
            server.wait()


def main(arguments: Sequence[str]) -> int:
    # A terminated demo must stop its server too, so the signal becomes an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run(parse(arguments))
    except (LaunchError, LiveAvatarError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
