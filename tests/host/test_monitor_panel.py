"""A run that people hold: paused, resumed and stopped over HTTP and in the page, and the panel that shows it."""

import asyncio
import json
import time

import aiohttp
import pytest
from test_player import PAGE, SECONDS_TO_WAIT, _seeds, ask, film, new_stream, packets, streams
from test_time_line import with_plan

from liveavatar_core.client.connection import Client, WorkflowFailed

BLOCKS, SECONDS, FRAMES = 5, 2.0, 50


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


def test_a_paused_run_can_be_cancelled(server) -> None:
    known = {state["id"] for state in streams(server)}

    async def run():
        async with Client(server.url) as client, aiohttp.ClientSession(server.url) as session:
            running = asyncio.create_task(client.run(film(AudioEncoder__seconds=SECONDS)))
            state = await new_stream(session, known, 0.0)
            assert await act(session, state, "pause") == 204
            await settled(session)
            await client.interrupt()
            with pytest.raises(WorkflowFailed, match="interrupted"):
                await running

    asyncio.run(asyncio.wait_for(run(), SECONDS_TO_WAIT))
    report = json.loads(ask(f"{server.url}/liveavatar/pipeline")[2])
    assert report["ended"] and not report["paused"] and report["problem"] == "cancelled"
    assert json.loads(ask(f"{server.url}/liveavatar/pipeline")[2])["now"] == report["now"], "its time is over"
    assert report["blocks"] < BLOCKS


def test_errors_are_reported_in_words(server, run_workflow) -> None:
    with pytest.raises(WorkflowFailed, match="plan 2x2 is for 4 devices"):
        run_workflow(with_plan(film(AudioEncoder__seconds=0.5), "cpu, cpu", "2x2"))
    report = json.loads(ask(f"{server.url}/liveavatar/pipeline")[2])
    assert report["ended"] and "plan 2x2 is for 4 devices" in report["problem"]
    assert (report["blocks"], report["spans"], report["fps"], report["first"]) == (0, [], None, None)


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


def told(before: int, spans: list[list], **more: object) -> dict:
    return {"id": "a", "now": 30.0, "fps": 24.0, "spans_before": before, "spans": spans} | more


def test_reports_become_boxes(browse, tmp_path) -> None:
    """Two stages; spans are [stage, kind, block, step, begin, end], and 10 s are 100 pixels. A block takes 2 s."""
    first = [[0, "compute", 0, 0, 21.0, 22.0], [0, "copy", 0, 0, 22.0, 22.5], [1, "compute", 0, 0, 22.5, 23.5]]
    more = [[1, "compute", 9, 0, 1.0, 2.0], [-1, "compute", 9, 0, 22.5, 23.5]]
    second = [first[2], *more, [-1, "compute", 0, 0, 23.5, 25.5], [0, "compute", 1, 0, 19.0, 20.5]]
    ideal = {"seconds": 2.0, "spans": [[0, "compute", 0, 0, 0.0, 1.0], [2, "compute", 0, 0, 1.0, 3.0]]}
    reports = [
        told(0, [[0, "compute", 5, 0, 0.0, 1.0]], id="the run before"),
        told(0, first, places=[{}, {}], plan="ring"),
        told(2, second, ideal=ideal),  # the third span once more
    ]
    (tmp_path / "reports.json").write_text(json.dumps(reports))
    seen = browse("lay_out.mjs", tmp_path / "reports.json")
    assert (seen["spans"], seen["plan"], seen["seconds"]) == (7, "ring", 15)
    assert seen["rate"] == 12 / 2 and seen["decoding"] == pytest.approx(0.3)
    assert sorted(seen["real"]) == [
        [-1, 0, 35, 20, 40, 15],
        [-1, 9, 25, 10, 40, 15],
        [0, 0, 10, 10, 0, 15],
        [0, 0, 20, 5, 15, 2],  # the copy, at the row's bottom
        [0, 1, 0, 5, 0, 15],  # began before what is shown
        [1, 0, 25, 10, 20, 15],
    ]
    assert sorted(seen["ideal"]) == sorted(
        [[0, 0, left, 10, 0, 15] for left in (0, 20, 40)]
        + [[-1, 0, left, width, 40, 15] for left, width in ((0, 10), (10, 20), (30, 20))]
    )
    assert seen["ticks"] == [20, 22, 24, 26, 28, 30]


def test_the_panel_shows_a_run_and_holds_it(server, browse, artefacts) -> None:
    """Two stages; one run is paused and resumed, another stopped."""
    seeds = [next(_seeds), next(_seeds)]
    seen = browse("watch_panel.mjs", server.url, PAGE, artefacts, seeds[0], SECONDS, "cpu, cpu")
    assert seen["before"].strip()
    assert "of 5 blocks" in seen["paused"] and "paused" in seen["paused"]
    assert "planned" in seen["paused"], "the memory plan"
    assert seen["real"] == 3, "two stages and the decoder"
    for words in ("done", "5 of 5 blocks", "plan ring", "frames a second", "first frames after"):
        assert words in seen["done"]
    assert seen["ideal"] == 3
    stopped = seen["stopped"]
    assert (
        stopped["text"].startswith("stopped")
        and "of 11 blocks" in stopped["text"]
        and stopped["video"]["size"] == [96, 64]
    )
    assert 0 < stopped["video"]["duration"] < 4
    assert seen["problems"] == [], "the page reported errors"
