"""Run a workflow on a ComfyUI, watch the video while it is made, and fetch what it saves.

  python -m liveavatar_core.client workflows/api/demo.json --set LoadImage.image=face.png --set LoadAudio.audio=a.wav
  python -m liveavatar_core.client workflows/api/demo.json --set PromptConditioner.text="A dwarf" --watch - | ffplay -

Lines on the standard error begin with one of: uploaded, queued (and the run's id), queue (and how many runs the server
has to finish, this one included), progress, stream (and its address), unwatched (the viewer is gone; the run goes on),
saved (and a path), stopped, error.
Exit status: 0 made, 1 refused or failed, 2 wrong arguments, 3 no server, 130 stopped by Ctrl-C; what was made until
then is saved.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from io import RawIOBase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from liveavatar_core.client.workflow import Progress, Workflow, patch, read, settings
from liveavatar_core.errors import InputError, LiveAvatarError, OutputError

if TYPE_CHECKING:
    from liveavatar_core.client.connection import Client

MADE, FAILED, WRONG, NO_SERVER, STOPPED = 0, 1, 2, 3, 130


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    try:
        from liveavatar_core.client.connection import ServerGone
    except ModuleNotFoundError as error:
        say(f"error {error.name} is missing, which comes with ComfyUI: pip install {error.name}")
        return WRONG
    try:
        return asyncio.run(make(options))
    except KeyboardInterrupt:
        say("stopped")
        return STOPPED
    except (LiveAvatarError, OSError) as error:
        say(f"error {error}")
        return {InputError: WRONG, ServerGone: NO_SERVER}.get(type(error), FAILED)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="liveavatar_core.client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workflow", type=Path, help="in API form, as those in workflows/api/")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="NODE is a class or an id; a file of this machine, for an input that takes files, is uploaded",
    )
    parser.add_argument("--watch", metavar="FILE", help="gets the video while it is made; -: the standard output")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="for what is saved; default: here")
    return parser.parse_args(arguments)


async def make(options: argparse.Namespace) -> int:
    from liveavatar_core.client.connection import Client

    workflow = read(options.workflow)
    with open_sink(options.watch) as sink:
        async with Client(options.server) as client:
            workflow = await with_values(client, workflow, options.set)
            run = Run(client, workflow, sink)
            try:
                outputs = await run.end()
                if outputs is None:
                    if run.stream:
                        await save(client.watch(run.stream), options.out / f"{run.id}.mp4")
                    return STOPPED
                for file in results(outputs):
                    path = place(options.out, file)
                    await save(client.download(file), path)
                    if sink and run.stream is None and path.suffix == ".mp4":  # it was made earlier
                        await copy(client.download(file), sink)
                return MADE
            finally:
                await run.watched()


async def with_values(client: "Client", workflow: Workflow, typed_in: Sequence[str]) -> Workflow:
    """The workflow with what --set says; files go to the server first."""
    values: dict[tuple[str, str], object] = {}
    for node_id, name, text, value in settings(workflow, typed_in):
        path = Path(text).expanduser()
        if path.is_file() and await client.takes_file(workflow[node_id]["class_type"], name):
            value = await client.upload(path)
            say(f"uploaded {value}")
        values[node_id, name] = value
    return patch(workflow, values)


class Run:
    """One run: says what happens to it, and gives its live video to `sink` as soon as there is one."""

    def __init__(self, client: "Client", workflow: Workflow, sink: RawIOBase | None) -> None:
        self._client, self._workflow, self._sink = client, workflow, sink
        self.id: str | None = None
        self.stream: str | None = None
        self._started = False
        self._waiting: int | None = None
        self._progress = Progress(workflow)
        self._watching: asyncio.Task | None = None

    async def end(self) -> dict[str, dict] | None:
        """What the output nodes report; None where the run was stopped by Ctrl-C."""
        from liveavatar_core.client.connection import WorkflowFailed

        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def stop(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends this program, whatever it waits for
            loop.call_soon_threadsafe(asked.set)

        before = signal.signal(signal.SIGINT, stop)
        running, stopping = asyncio.create_task(self._run()), asyncio.create_task(asked.wait())
        try:
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            say("stopped")
            if self.id:
                await self._client.interrupt(self.id)
            if not self._started:  # then no message tells of its end
                running.cancel()
            await asyncio.wait({running})
            if running.cancelled() or isinstance(running.exception(), WorkflowFailed):
                return None
            return running.result()
        finally:
            stopping.cancel()
            signal.signal(signal.SIGINT, before)

    async def _run(self) -> dict[str, dict]:
        return await self._client.run(self._workflow, self._hear)

    async def watched(self) -> None:
        """Return when the viewer has all there is."""
        if self._watching:
            await self._watching

    def _hear(self, kind: str, data: dict) -> None:
        if kind == "queued":
            self.id = data["prompt_id"]
            say(f"queued {self.id}")
        if kind == "status" and self.id and not self._started:
            waiting = data["status"]["exec_info"]["queue_remaining"]
            if waiting and waiting != self._waiting:
                say(f"queue {waiting}")
            self._waiting = waiting
        if kind == "execution_start":
            self._started = True
        # The server makes one video at a time: what begins while our run runs is ours.
        if kind == "liveavatar.stream" and self._started and self.stream is None and not data["ended"]:
            self.stream = data["id"]
            say(f"stream {self._client.url}/liveavatar/stream/{self.stream}.mp4")
            if self._sink:
                self._watching = asyncio.create_task(copy(self._client.watch(self.stream), self._sink))
        for line in self._progress.news(kind, data):
            say(f"progress {line}")


def results(outputs: dict[str, dict]) -> Iterator[dict]:
    """The files that output nodes saved; previews are not among them."""
    for output in outputs.values():
        for found in output.values():
            for file in found if isinstance(found, list) else ():
                if isinstance(file, dict) and file.get("type") == "output":
                    yield file


def place(folder: Path, file: dict) -> Path:
    """As in the server's own output folder; its words lead nowhere else."""
    path = PurePath(file["subfolder"], file["filename"])
    if path.anchor or ".." in path.parts:
        raise OutputError(f"the server calls a result {path}, which is not below its output folder")
    return folder / path


async def save(pieces: AsyncIterator[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        async for piece in pieces:
            file.write(piece)
    say(f"saved {path}")


def open_sink(name: str | None) -> contextlib.AbstractContextManager[RawIOBase | None]:
    if name is None:
        return contextlib.nullcontext()
    if name != "-":
        return open(name, "wb", buffering=0)
    if sys.stdout.isatty():
        raise InputError("--watch - writes the video to a terminal; pipe it into a player: --watch - | ffplay -")
    return open(sys.stdout.fileno(), "wb", buffering=0, closefd=False)


async def copy(pieces: AsyncIterator[bytes], sink: RawIOBase) -> None:
    """A viewer that goes away ends the watching, not the run."""
    try:
        async for piece in pieces:
            await asyncio.to_thread(_write, sink, piece)
    except OSError as error:
        say(f"unwatched {error}")


def _write(sink: RawIOBase, piece: bytes) -> None:
    """All of it: an unbuffered file may take less at a time."""
    rest = memoryview(piece)
    while rest:
        rest = rest[sink.write(rest) :]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
