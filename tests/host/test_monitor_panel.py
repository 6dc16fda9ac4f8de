"""A run that people hold: paused, resumed and stopped over HTTP and in the page, and the panel that shows it."""

import asyncio
import json
import time

import aiohttp
import pytest
from test_player import SECONDS_TO_WAIT, ask, film, new_stream, packets, streams

from liveavatar_core.client.connection import Client

BLOCKS, SECONDS, FRAMES = 3, 1.2, 30


async def act(session: aiohttp.ClientSession, state: dict, action: str) -> int:
    async with session.post(f"/liveavatar/stream/{state['id']}/{action}") as answer:
        return answer.status


async def settled(session: aiohttp.ClientSession) -> dict:
    """The panel's report of a paused run, once nothing more is added to it."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    before = 0
    while time.monotonic() < deadline:
        async with session.get("/liveavatar/pipeline") as answer:
            report = await answer.json()
        if before == report["blocks"] > 0:
            return report
        before = report["blocks"]
        await asyncio.sleep(1)
    raise AssertionError("it goes on")


def hold(server, workflow: dict, steps) -> tuple[dict, bytes, list[dict]]:
    """Run a film while `steps(session, state)` act on it: their result, its file, its states as pages heard them."""
    known = {state["id"] for state in streams(server)}
    heard: list[dict] = []

    async def run():
        async with Client(server.url) as client, aiohttp.ClientSession(server.url) as session:
            async with session.ws_connect("/ws") as socket:
                running = asyncio.create_task(client.run(workflow))
                state = await new_stream(session, known, 0.0)
                result = await steps(session, state)
                outputs = await running
                while not (heard and heard[-1]["ended"]):
                    message = await socket.receive()
                    told = json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else {}
                    if told.get("type") == "liveavatar.stream" and told["data"]["id"] == state["id"]:
                        heard.append(told["data"])
            files = (file for output in outputs.values() for file in output.get("images", []))
            (file,) = (file for file in files if file["filename"].endswith(".mp4"))
            return result, await client.fetch(file)

    return *asyncio.run(asyncio.wait_for(run(), SECONDS_TO_WAIT)), heard


def test_a_paused_run_waits_and_then_ends_as_ever(server) -> None:
    async def steps(session, state):
        assert await act(session, state, "pause") == 204
        report = await settled(session)
        assert await act(session, state, "resume") == 204
        return report

    report, file, heard = hold(server, film(AudioEncoder__seconds=SECONDS), steps)
    assert report["paused"] and not report["ended"] and not report["problem"]
    assert 0 < report["blocks"] < report["total"] == BLOCKS and 0 < report["first"] < report["now"]
    assert any(state["paused"] for state in heard)
    last = heard[-1]
    assert last["ready"] == SECONDS and last["ended"] and not last["paused"] and last["made_fps"] > 0
    assert len(packets(file)["video"]) == FRAMES


def test_a_stopped_run_is_a_success_and_not_taken_for_the_whole(server) -> None:
    async def steps(session, state):
        assert await act(session, state, "pause") == 204
        report = await settled(session)
        assert await act(session, state, "stop") == 204
        return report

    workflow = film(AudioEncoder__seconds=SECONDS)
    report, file, heard = hold(server, workflow, steps)
    last, kept = heard[-1], packets(file)
    assert last["ended"] and not last["paused"] and 0 < last["ready"] < SECONDS
    assert len(kept["video"]) == round(last["ready"] * last["fps"])
    sound = float(sum(length for _, length, _ in kept["audio"]))
    assert sound == pytest.approx(last["ready"], abs=0.1)

    async def nothing(session, state):
        return [await act(session, state, action) for action in ("resume", "dance")]

    statuses, file, _ = hold(server, workflow, nothing)
    assert len(packets(file)["video"]) == FRAMES, "asked for once more, all of it is made"
    assert statuses == [204, 405]


def test_only_a_running_stream_can_be_held(server) -> None:
    for name in ["nothing", "%2e%2e", *(state["id"] for state in streams(server))]:
        for action in ("pause", "resume", "stop"):
            url = f"{server.url}/liveavatar/stream/{name}/{action}"
            assert ask(url, "POST")[0] == 404
            assert ask(url, "GET")[0] == ask(url, "DELETE")[0] == 405


def test_other_sites_cannot_hold_or_look(server) -> None:
    for headers in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(f"{server.url}/liveavatar/pipeline", **headers)[0] == 403
        for action in ("pause", "resume", "stop"):
            assert ask(f"{server.url}/liveavatar/stream/nothing/{action}", "POST", **headers)[0] == 403
