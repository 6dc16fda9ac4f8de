"""Watching a video while it is made: the stream over HTTP as any program sees it, and the player in the page."""

import asyncio
import io
import itertools
import json
import statistics
import time
import urllib.error
import urllib.request
from fractions import Fraction
from pathlib import Path

import aiohttp
import av
import pytest
from test_hostile import small

from bench.slow_viewers import measure
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


def test_a_head_says_what_there_is(server, run_workflow) -> None:
    run_workflow(film(AudioEncoder__seconds=0.5))
    status, headers, body = ask(f"{server.url}/liveavatar/stream/{streams(server)[-1]['id']}.mp4", "HEAD")
    assert (status, headers["Content-Type"], body) == (200, "video/mp4", b"")


def test_slow_viewers_hold_nothing_up(server, artefacts) -> None:
    """One never reads and one hardly does. How little it costs is for a quiet machine: bench/slow_viewers.py."""
    seen = measure(server.url, turns=3)
    (artefacts / "slow_viewers.json").write_text(json.dumps(seen))
    assert seen["slow_viewer_reads"] < 0.01 and seen["megabytes"] > 8
    assert seen["ratio"] < 2, "at their speed it would be a hundred times as slow"


@pytest.fixture(scope="module")
def seen(server, browse, artefacts) -> dict:
    """What watch_player.mjs saw in its three pages."""
    found = browse("watch_player.mjs", server.url, PAGE, artefacts, next(_seeds))
    (artefacts / "player.json").write_text(json.dumps(found))
    return found


def test_it_begins_with_the_first_block(seen) -> None:
    begun = seen["begun"]
    assert begun["fed"] and begun["time"] < 0.36 and begun["line"].startswith("0.4 of 6.0 s"), (
        "there was one block only"
    )
    assert seen["line"].endswith("1 block late") and "made at 21.3 of 25 frames a second" in seen["line"]
    assert seen["run"]["begun"]["fed"] and " of 1.6 s" in seen["run"]["begun"]["line"], "a run is seen only afterwards"
    print(f"begins {begun['after']:.0f} ms after the page is told of the first block")


def test_it_plays_to_the_end_without_a_gap(seen) -> None:
    """In the page that saw all of it and in the one that came late, and again."""
    for end in seen["ends"]:
        assert end["time"] == pytest.approx(6, abs=0.05) == end["duration"]
        ((begin, until),) = end["buffered"]  # one range: no gap
        assert begin == 0 and until == pytest.approx(6, abs=0.05)
        assert end["sound"] > 0 and end["line"] == "6.0 s"
    assert seen["shown"] == sorted(set(seen["shown"])), "a picture came twice, or back"


def test_picture_and_sound_are_together(seen) -> None:
    """Every second a clap. The screen is drawn every 17 ms, and the browser's sound comes in pieces of 10."""
    white = [frame for frame in seen["frames"] if frame["white"]]
    offsets = []
    for heard in seen["sounds"]:
        frame = min(white, key=lambda frame: abs(frame["shown"] - heard))
        into_the_clap = 1000 * (frame["at"] % 1)
        offsets.append(heard - (frame["shown"] - into_the_clap))
    assert len(offsets) >= 8
    assert abs(statistics.median(offsets)) <= 40, offsets
    print(f"sound after picture: {statistics.median(offsets):.0f} ms, {min(offsets):.0f} to {max(offsets):.0f}")


def test_who_comes_late_joins_near_the_end(seen) -> None:
    """2.28 s were there when the second page came, 4.2 when it was loaded again."""
    assert seen["joined"]["fed"] and 1.27 <= seen["joined"]["time"] <= 2.28
    assert seen["again"]["fed"] and 3.19 <= seen["again"]["time"] <= 4.2


def test_it_seeks_in_what_there_is(seen) -> None:
    assert seen["beyond"] == pytest.approx(1.28, abs=0.01), "it went where nothing is yet"
    assert seen["paused"] == seen["beyond"], "it played on"
    assert seen["back"] == pytest.approx(0.5, abs=0.01)


def test_it_saves_the_video_so_far(seen) -> None:
    assert seen["saved"]["name"] == "hand_made.mp4"
    saved = packets(Path(seen["saved"]["path"]).read_bytes())
    assert 50 <= len(saved["video"]) <= 57 and saved["audio"]


def test_a_page_that_cannot_be_fed_plays_the_stream_itself(seen) -> None:
    """One whose browser says no, and one that forbids it to itself as ComfyUI's does without outside connections."""
    for end in seen["direct"]:
        assert not end["fed"] and end["time"] == pytest.approx(1.6, abs=0.05)
        assert end["frames"] >= FRAMES and end["sound"] > 0 and end["line"] == "1.6 s"
    assert seen["stopped"]["line"].startswith("stopped at 0.")


def test_previews_are_for_pages_that_cannot_play(seen) -> None:
    assert not seen["covered"] and not seen["run"]["covered"], "a preview picture beside the player"
    unplayable = seen["unplayable"]
    assert unplayable == {"line": "This browser cannot play the video.", "height": 0, "previews": True}


def test_it_leaves_for_the_finished_video_and_with_its_node(seen) -> None:
    assert seen["run"]["height"] == 0, "two videos in one node"
    assert seen["removed"] == {"source": None, "addresses": 0}


def test_a_hundred_films_leave_nothing(seen) -> None:
    """Listeners of the whole page, DOM nodes, and addresses of media: after ten films, and after a hundred."""
    few, many = seen["hundred"]
    assert many["made"] - few["made"] == 90
    assert many["addresses"] == few["addresses"] == 0
    assert many["video"] == few["video"]
    assert many["all"] - few["all"] < 45 and many["nodes"] - few["nodes"] < 45, "something is left of each"


def test_pages_reported_no_errors(seen) -> None:
    assert seen["problems"] == []
