"""Watching a video while it is made: the stream over HTTP as any program sees it, and the player in the page."""

import asyncio
import io
import itertools
import json
import os
import socket
import time
import urllib.error
import urllib.request
from fractions import Fraction

import aiohttp
import av
import pytest
from test_hostile import small

from launch import ROOT
from liveavatar_core.client.connection import Client, WorkflowFailed

PAGE = ROOT / "workflows" / "demo.json"
SECONDS, FRAMES = 1.6, 40  # of a film; four blocks
LATE = 0.8  # seconds that are ready when a late viewer comes
SECONDS_TO_WAIT = 200
_seeds = itertools.count(7_000)


def film(**changes: object) -> dict:
    """A workflow of several blocks that has not been run before."""
    return small(**{"AudioEncoder__seconds": SECONDS, "Sampler__seed": next(_seeds)} | changes)


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict, bytes]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_WAIT) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as refusal:
        return refusal.code, dict(refusal.headers), refusal.read()


def streams(server) -> list[dict]:
    return json.loads(ask(f"{server.url}/liveavatar/streams")[2])


def packets(content: bytes) -> dict[str, list[tuple[Fraction, Fraction, bytes]]]:
    """(time, length, bytes) of each packet, per kind of stream."""
    found: dict[str, list] = {}
    with av.open(io.BytesIO(content)) as file:
        for packet in file.demux():
            if packet.dts is not None:
                base = packet.time_base
                found.setdefault(packet.stream.type, []).append(
                    (packet.dts * base, packet.duration * base, bytes(packet))
                )
    return found


async def new_stream(session: aiohttp.ClientSession, known: set[str], ready: float) -> dict:
    """The stream that a run just opened, once so many seconds of it are there."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while time.monotonic() < deadline:
        async with session.get("/liveavatar/streams") as answer:
            states = [state for state in await answer.json() if state["id"] not in known]
        if states and states[0]["ready"] >= ready:
            return states[0]
        await asyncio.sleep(0.02)
    raise AssertionError("no stream within the time")


async def watch(session: aiohttp.ClientSession, known: set[str], ready: float) -> tuple[dict, bytes, bool]:
    """Join when so much is ready: what was known on joining, all bytes, and whether the first came before the end."""
    state = await new_stream(session, known, ready)
    async with session.get(f"/liveavatar/stream/{state['id']}.mp4") as answer:
        assert answer.status == 200 and answer.content_type == "video/mp4"
        first = await answer.content.readany()
        async with session.get("/liveavatar/streams") as listed:
            running = any(other["id"] == state["id"] and not other["ended"] for other in await listed.json())
        return state, first + await answer.content.read(), running


def test_viewers_get_the_film_while_it_is_made(server) -> None:
    """One from the beginning, one late: both have all of it, and it is what the file holds."""
    known = {state["id"] for state in streams(server)}

    async def run():
        async with Client(server.url) as client, aiohttp.ClientSession(server.url) as session:
            viewers = [asyncio.create_task(watch(session, known, ready)) for ready in (0.0, LATE)]
            outputs = await client.run(film())
            files = (file for output in outputs.values() for file in output.get("images", []))
            (file,) = (file for file in files if file["filename"].endswith(".mp4"))
            return await asyncio.gather(*viewers), await client.fetch(file)

    (early, late), file = asyncio.run(asyncio.wait_for(run(), SECONDS_TO_WAIT))
    for state, _, running in (early, late):
        assert running, "bytes came only after the run"
        assert not state["ended"] and state["total"] == SECONDS and state["fps"] == 25
    assert early[0]["ready"] < LATE <= late[0]["ready"] < SECONDS
    assert early[1] == late[1]
    seen, kept = packets(early[1]), packets(file)
    assert set(seen) == {"video", "audio"}
    for kind, stream in seen.items():
        assert [data for *_, data in stream] == [data for *_, data in kept[kind]]
        times = [when for when, *_ in stream]
        assert times == [when for when, *_ in kept[kind]]
        assert all(begin + length == then for (begin, length, _), then in zip(stream[:-2], times[1:], strict=False))
    assert len(seen["video"]) == FRAMES
    (state,) = (state for state in streams(server) if state["id"] == early[0]["id"])
    assert state["ended"] and state["ready"] == SECONDS
    assert ask(f"{server.url}/liveavatar/stream/{state['id']}.mp4")[2] == early[1], "it can be seen afterwards"


def test_a_viewer_that_never_reads_holds_nothing_up(server) -> None:
    known = {state["id"] for state in streams(server)}

    async def run():
        async with Client(server.url) as client, aiohttp.ClientSession(server.url) as session:
            running = asyncio.create_task(client.run(film()))
            state = await new_stream(session, known, 0.0)
            stalled = socket.socket()
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", server.port))
            stalled.sendall(f"GET /liveavatar/stream/{state['id']}.mp4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            with stalled:
                await running
                return await asyncio.to_thread(ask, f"{server.url}/liveavatar/stream/{state['id']}.mp4")

    status, _, content = asyncio.run(asyncio.wait_for(run(), SECONDS_TO_WAIT))
    assert status == 200 and len(packets(content)["video"]) == FRAMES


def test_a_stopped_run_ends_its_stream(server) -> None:
    known = {state["id"] for state in streams(server)}

    async def run():
        async with Client(server.url) as client, aiohttp.ClientSession(server.url) as session:
            viewer = asyncio.create_task(watch(session, known, 0.4))
            running = asyncio.create_task(client.run(film()))
            await new_stream(session, known, 0.4)
            await client.interrupt()
            with pytest.raises(WorkflowFailed, match="interrupted"):
                await running
            return await viewer

    _, content, _ = asyncio.run(asyncio.wait_for(run(), SECONDS_TO_WAIT))
    assert 0 < len(packets(content)["video"]) < FRAMES


@pytest.mark.parametrize(
    "name",
    [
        "nothing.mp4",
        ".mp4",
        "..mp4",
        "../../system_stats",
        "%2e%2e%2f%2e%2e%2fcomfyui.log",
        "..%5C..%5Ctiny_host.json.mp4",
        "%00.mp4",
        "a" * 4000 + ".mp4",
        "%F0%9F%8E%AC.mp4",
        "id/of/a/folder.mp4",
        "'; DROP TABLE streams.mp4".replace(" ", "%20"),
    ],
)
def test_an_id_that_is_none_finds_nothing(server, name) -> None:
    status, _, body = ask(f"{server.url}/liveavatar/stream/{name}")
    assert status == 404 and len(body) < 200


def test_an_id_without_its_ending_finds_nothing(server, run_workflow) -> None:
    run_workflow(film(AudioEncoder__seconds=0.5))
    url = f"{server.url}/liveavatar/stream/{streams(server)[-1]['id']}"
    assert ask(url)[0] == 404
    status, headers, body = ask(url + ".mp4", "HEAD")
    assert (status, headers["Content-Type"], body) == (200, "video/mp4", b"")
    assert ask(url + ".mp4", "POST")[0] == 405


def test_other_sites_are_refused(server, run_workflow) -> None:
    run_workflow(film(AudioEncoder__seconds=0.5))
    for url in (
        f"{server.url}/liveavatar/streams",
        f"{server.url}/liveavatar/stream/{streams(server)[-1]['id']}.mp4",
    ):
        assert ask(url, Origin=server.url)[0] == 200
        assert ask(url, Origin="http://elsewhere.example")[0] == 403
        assert ask(url, **{"Sec-Fetch-Site": "cross-site"})[0] == 403


@pytest.mark.skipif("CI" in os.environ, reason="waits for pages on the clock, which a busy machine does not keep")
@pytest.mark.parametrize("nodes", ["classic", "vue"])
def test_the_player_plays_while_the_film_is_made(nodes, server, browse, artefacts) -> None:
    """In two pages, one of which comes later, goes back, pauses, and has its node deleted."""
    seen = browse("watch_player.mjs", server.url, PAGE, artefacts, next(_seeds), SECONDS, "free", nodes)
    for start in (seen["begun"], seen["joined"]):
        assert start["blob"], "the video is not fed block by block"
    assert f"of {SECONDS} s" in seen["begun"]["line"], "it began only after the run"
    for end in seen["ends"]:
        assert end["time"] == pytest.approx(SECONDS, abs=0.05) == end["duration"]
        ((begin, until),) = end["buffered"]  # one range: no gap
        assert begin == 0 and until == pytest.approx(SECONDS, abs=0.05)
        assert end["frames"] >= FRAMES and end["size"] == [96, 64]
        assert end["sound"] > 0
        assert end["line"] == f"{SECONDS} s"
    assert 0.4 <= seen["sought"]["paused"] == seen["sought"]["after"] < SECONDS
    assert seen["left"] == {"source": None, "height": 0}, "two videos in one node"
    assert seen["removed"] == {"connected": False, "source": None, "addresses": 0}
    assert seen["problems"] == [], "the page reported errors"


@pytest.mark.skipif("CI" in os.environ, reason="waits for pages on the clock, which a busy machine does not keep")
def test_a_page_that_may_not_be_fed_plays_the_stream_itself(server, browse, artefacts) -> None:
    """As ComfyUI's page is when it forbids itself outside connections."""
    seen = browse("watch_player.mjs", server.url, PAGE, artefacts, next(_seeds), SECONDS, "closed", "classic")
    assert not seen["begun"]["blob"]
    for end in seen["ends"]:
        assert end["time"] == pytest.approx(SECONDS, abs=0.05)
        assert end["frames"] >= FRAMES and end["sound"] > 0
