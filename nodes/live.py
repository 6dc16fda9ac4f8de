"""Videos that can be watched while they are made: the bytes so far of each, and the routes that hand them out.

A run appends and never waits: bytes go to a file of their own in the host's temporary folder, and each viewer reads
that file at its own pace. Runs append from the host's worker thread; everything else happens in its event loop.

    GET /liveavatar/streams           what is being made, and what was made last
    GET /liveavatar/stream/<id>.mp4   fragmented mp4 from its beginning, as far as it is and then as it comes;
                                      with ?so_far only as far as it is
"""

import asyncio
import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
from aiohttp import web
from server import PromptServer

if TYPE_CHECKING:
    from .runs import Run

log = logging.getLogger(__name__)

EVENT = "liveavatar.stream"  # on the host's websocket, with a State
MAX_STREAMS = 4  # whose bytes are kept
MAX_VIEWERS = 64
CHUNK = 64 * 1024
SECONDS_WITHOUT_READING = 600  # after which a viewer is let go; a paused player reads nothing
SECONDS_BETWEEN_LOOKS = 2  # whether a viewer is still there, while there is nothing to send
HEADERS = {"Content-Type": "video/mp4", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


@dataclass(frozen=True)
class State:
    """What a page shows of a stream besides its picture. Times are seconds of video."""

    id: str
    node: str
    file: str  # name of the finished video
    total: float
    fps: float  # at which it plays
    ready: float = 0.0
    made_fps: float | None = None  # at which it is made; None while that cannot be told
    late: int = 0  # blocks that came after their time
    paused: bool = False
    ended: bool = False


class LiveStream:
    """The growing video of one run. Use as a context manager: leaving it ends the stream, after an error too."""

    def __init__(self, run: "Run", file: str, total: float, fps: float) -> None:
        self._hold = run.hold
        self._state = State(run.id, run.node, file, total, fps)
        folder = Path(folder_paths.get_temp_directory()) / "liveavatar"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{self.state.id}.live"
        self.changed = asyncio.Event()  # another one after each change
        self._file = self.path.open("wb")

    @property
    def state(self) -> State:
        return replace(self._state, paused=self._hold.paused and not self._state.ended)

    def append(self, data: bytes) -> None:
        """The next bytes of the video. A full disk ends the watching, not the run."""
        if self._file.closed:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            log.warning("Live Avatar: the video cannot be watched any further while it is made (%s)", error)
            self.close()
            return
        self._notify()

    def tell(self, ready: float, made_fps: float | None, late: int) -> None:
        """A block is written; pages hear of it."""
        self._state = replace(self._state, ready=ready, made_fps=made_fps, late=late)
        self.say()

    def close(self) -> None:
        if not self._state.ended:
            try:
                self._file.close()
            except OSError:
                pass  # what could not be written is lost to viewers only
            self._state = replace(self._state, ended=True)
            self._notify()
            self.say()

    def discard(self) -> None:
        """Remove the bytes. A viewer in the middle of them keeps them, or where the system forbids that the file stays
        until the host empties its temporary folder."""
        self.close()
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            pass

    def _notify(self) -> None:
        PromptServer.instance.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    def say(self) -> None:
        PromptServer.instance.send_sync(EVENT, asdict(self.state))

    def __enter__(self) -> "LiveStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_streams: "OrderedDict[str, LiveStream]" = OrderedDict()
_viewers = 0


def open_stream(run: "Run", file: str, total: float, fps: float) -> LiveStream:
    """A new stream that can be watched from now on; the oldest one makes room for it."""
    stream = LiveStream(run, file, total, fps)
    _streams[run.id] = stream
    while len(_streams) > MAX_STREAMS:
        _streams.popitem(last=False)[1].discard()
    return stream


def say(name: str) -> None:
    """Something about the stream, if it can be watched, has changed; pages hear of it."""
    stream = _streams.get(name)
    if stream is not None:
        stream.say()


def add_routes(routes: web.RouteTableDef) -> None:
    routes.get("/liveavatar/streams")(_list)
    routes.get("/liveavatar/stream/{name}")(_watch)


async def _list(request: web.Request) -> web.Response:
    return web.json_response([asdict(stream.state) for stream in list(_streams.values())])


async def _watch(request: web.Request) -> web.StreamResponse:
    global _viewers
    # An id is a key here and never part of a path.
    name = request.match_info["name"]
    stream = _streams.get(name.removesuffix(".mp4")) if name.endswith(".mp4") else None
    if stream is None:
        return web.Response(status=404, text="No such stream.")
    if request.method == "HEAD":
        return web.Response(headers=HEADERS)
    if _viewers >= MAX_VIEWERS:
        return web.Response(status=503, text=f"{MAX_VIEWERS} viewers are watching already.")
    response = web.StreamResponse(headers=HEADERS)
    _viewers += 1
    try:
        await response.prepare(request)
        await _send(stream, request, response)
    except (ConnectionError, asyncio.TimeoutError):  # noqa: UP041 - not the same before Python 3.11
        pass  # the viewer is gone
    finally:
        _viewers -= 1
    return response


async def _send(stream: LiveStream, request: web.Request, response: web.StreamResponse) -> None:
    """All there is and, unless it is asked for so far, all that comes, as fast as the viewer takes it."""
    with stream.path.open("rb") as file:
        while True:
            changed, ended = stream.changed, stream.state.ended  # before reading, so that nothing is missed
            data = await asyncio.to_thread(file.read, CHUNK)
            if data:
                await asyncio.wait_for(response.write(data), SECONDS_WITHOUT_READING)
            elif ended or "so_far" in request.query:
                await response.write_eof()
                return
            elif request.transport is None:
                return  # the viewer is gone
            else:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), SECONDS_BETWEEN_LOOKS)
