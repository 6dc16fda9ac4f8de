"""What slow viewers cost a run: one that never reads and one at less than 1 % of the speed, against none, in one run.

    LIVEAVATAR_COMFYUI=TREE python bench/slow_viewers.py [TURNS]

In a real ComfyUI, with the films of tests/host/hand_made: all that a run does once it has its frames, and no model, so
that nothing hides what waiting would cost. The viewers come and go with every turn. Prints one JSON line.
"""

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parent.parent
BLOCKS_TO_SETTLE, BLOCKS_PER_TURN = 3, 5  # what a viewer's sockets hold is sent at once, and is not what is asked for
BLOCKS_BEFORE = 12  # megabytes, more than the sockets between server and viewer hold
PIECE, PAUSE = 512, 0.1  # bytes that the slow viewer reads, and seconds until it reads again


def measure(url: str, turns: int, width: int = 320, height: int = 240) -> dict:
    """Median seconds per block with and without the viewers, and their ratio."""

    def film(action: str, **wanted: object) -> dict | list:
        request = urllib.request.Request(f"{url}/hand_made/{action}", json.dumps(wanted).encode())
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    name = film("open", node="", seconds=1000, width=width, height=height)["id"]
    before = sum(film("write", id=name, blocks=BLOCKS_BEFORE))
    took: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * turns):
        watched = turn % 2 == 1
        with slow_viewers(url, name) if watched else contextlib.nullcontext():
            settling = film("write", id=name, blocks=BLOCKS_TO_SETTLE)
            took[watched] += film("write", id=name, blocks=BLOCKS_PER_TURN)
            before += sum(settling)
    film("close", id=name)
    with urllib.request.urlopen(f"{url}/liveavatar/stream/{name}.mp4") as answer:
        size = len(answer.read())
    alone, watched = (statistics.median(took[key]) for key in (False, True))
    speed = size / sum(map(sum, took.values()), before)  # bytes a second, at which the film is made
    return {
        "seconds_per_block": alone,
        "with_slow_viewers": watched,
        "ratio": watched / alone,
        "blocks": 2 * turns * BLOCKS_PER_TURN,
        "megabytes": size / 1e6,
        "slow_viewer_reads": PIECE / PAUSE / speed,
    }


@contextlib.contextmanager
def slow_viewers(url: str, name: str) -> Iterator[None]:
    address, gone = urlsplit(url), threading.Event()

    def ask() -> socket.socket:
        viewer = socket.socket()
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.connect((address.hostname, address.port))
        viewer.sendall(f"GET /liveavatar/stream/{name}.mp4 HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        assert b" 200 " in viewer.recv(64)
        return viewer

    def read_slowly(viewer: socket.socket) -> None:
        while not gone.wait(PAUSE):
            viewer.recv(PIECE)

    with ask(), ask() as slow:
        reading = threading.Thread(target=read_slowly, args=[slow], name="slow viewer")
        reading.start()
        try:
            yield
        finally:
            gone.set()
            reading.join()


def main(turns: int) -> None:
    sys.path.insert(0, str(ROOT))
    from launch.comfy import PACK, Comfy

    packs = {PACK: ROOT, "HandMade": ROOT / "tests" / "host" / "hand_made"}
    with Comfy(Path(os.environ["LIVEAVATAR_COMFYUI"]), packs=packs) as server:
        print(json.dumps(measure(server.url, turns)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
