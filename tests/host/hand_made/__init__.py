"""A pack for tests only: a film with a clap every second, made block by block, each when a test asks for it.

Beside the model it is a run like any other: a thread hands frames and sound to the VideoWriter, the growing file's
bytes go to a LiveStream, and pages hear of each block.

    POST /hand_made/open    {"node", "seconds", "width", "height"}: the stream's state
    POST /hand_made/write   {"id", "blocks", "made_fps", "late"}: the seconds that each block took
    POST /hand_made/close   {"id"}
"""

import asyncio
import math
import secrets
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}  # ComfyUI takes a folder without it for a broken pack

FPS, RATE = 25, 16_000
FIRST_BLOCK, BLOCK = 9, 12  # frames, as the model's
CLAP = 5  # frames that are white, with a tone that begins with the first


class Film:
    def __init__(self, node: str, seconds: float, width: int, height: int) -> None:
        from liveavatar_core.io.video import VideoWriter
        from liveavatar_core.pipeline.hold import Hold

        (live,) = (module for name, module in sys.modules.items() if name.endswith("LiveAvatar.nodes.live"))
        self._done, self._frames, self._shape = 0, round(seconds * FPS), (height, width, 3)
        run = SimpleNamespace(id=secrets.token_urlsafe(16), node=node, hold=Hold())
        with ExitStack() as stack:
            self.stream = stack.enter_context(live.open_stream(run, "hand_made.mp4", seconds, FPS))
            path = Path(folder_paths.get_temp_directory()) / f"{self.stream.state.id}.mp4"
            options = {"width": width, "height": height, "fps": FPS, "sample_rate": RATE, "channels": 1}
            self._writer = stack.enter_context(VideoWriter(path, **options, watch=self.stream.append))
            self.close = stack.pop_all().close

    def write(self, blocks: int, made_fps: float | None, late: int) -> list[float]:
        took = []
        for _ in range(blocks):
            numbers = range(self._done, min(self._done + (BLOCK if self._done else FIRST_BLOCK), self._frames))
            frames, sound = self._picture(numbers), self._sound(numbers)
            begun = time.perf_counter()
            self._writer.write(frames, sound)
            self._done = numbers.stop
            self.stream.tell(self._done / FPS, made_fps, late)
            took.append(time.perf_counter() - begun)
        return took

    def _picture(self, numbers: range) -> torch.Tensor:
        frames = torch.randint(0, 64, (len(numbers), *self._shape), dtype=torch.uint8)
        frames[[number % FPS < CLAP for number in numbers]] = 255
        return frames

    def _sound(self, numbers: range) -> torch.Tensor:
        when = torch.arange(numbers.start * RATE // FPS, numbers.stop * RATE // FPS) / RATE
        return (torch.sin(2 * math.pi * 1000 * when) * (when % 1 < CLAP / FPS) * 0.9)[None]


films: dict[str, Film] = {}
routes = PromptServer.instance.routes


@routes.post("/hand_made/open")
async def _open(request: web.Request) -> web.Response:
    film = await asyncio.to_thread(Film, **await request.json())
    films[film.stream.state.id] = film
    return web.json_response({"id": film.stream.state.id})


@routes.post("/hand_made/write")
async def _write(request: web.Request) -> web.Response:
    wanted = {"blocks": 1, "made_fps": None, "late": 0} | await request.json()
    film = films[wanted.pop("id")]
    return web.json_response(await asyncio.to_thread(film.write, **wanted))


@routes.post("/hand_made/close")
async def _close(request: web.Request) -> web.Response:
    await asyncio.to_thread(films.pop((await request.json())["id"]).close)
    return web.json_response({})
