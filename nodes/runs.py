"""The run that is going on, or was last: what the pipeline panel shows of it, and the hold that people have on it.

Pages are told what is new a few times a second, only while something runs, and only if there is a page.

    GET  /liveavatar/pipeline                           what a page that comes later must know; null before any run
    POST /liveavatar/stream/<id>/{pause,resume,stop}    obeyed when the block that is being made is there
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

import comfy.model_management
from aiohttp import web
from server import PromptServer

from liveavatar_core.pipeline.hold import Hold
from liveavatar_core.pipeline.monitor import Span
from liveavatar_core.pipeline.plan import Plan

from . import host, live
from .types import Avatar

log = logging.getLogger(__name__)

EVENT = "liveavatar.pipeline"  # on the host's websocket, with a report
SECONDS_BETWEEN_REPORTS = 0.25
SECONDS_BETWEEN_IDEALS = 10.0  # the work of tens of milliseconds, for eight stages
SPANS_IN_IDEAL = 1000  # latest ones, whose medians it takes
SECONDS_OF_SPANS = 120.0  # that a page is told when it comes

_run: "Run | None" = None
_cut_short: Counter[str] = Counter()  # by node: runs that were stopped before their end


class Run:
    """One pulling of a stream. Use as a context manager around it. Times are seconds since this was made."""

    def __init__(self, node: str | None, avatar: Avatar) -> None:
        self.id = secrets.token_urlsafe(16)
        self.node = node or ""
        self.avatar = avatar
        self.hold = Hold()
        loading = host.bytes_progress(lambda percent: host.say(node, f"loading the model: {percent} %"))
        self.latents = avatar.stream.latents(host.should_stop, loading, self.hold)
        self._end: float | None = None
        self._begun = time.perf_counter()
        self._first: float | None = None  # when the first frames were there
        self._blocks = 0
        self._problem = ""
        self._ideal: tuple[list[Span], float] | None = None

    @property
    def ended(self) -> bool:
        return self._end is not None

    def block(self) -> None:
        """Another block's frames are there."""
        self._blocks += 1
        if self._first is None:
            self._first = time.perf_counter() - self._begun

    def __enter__(self) -> "Run":
        global _run
        _run = self
        telling = asyncio.run_coroutine_threadsafe(self._tell_while_running(), PromptServer.instance.loop)
        telling.add_done_callback(_complain)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, comfy.model_management.InterruptProcessingException):
            self._problem = "cancelled"
        elif isinstance(error, Exception):
            self._problem = str(error) or repr(error)
        elif self.hold.stopped and self._blocks < self.avatar.stream.blocks:
            _cut_short[self.node] += 1
        self._end = time.perf_counter()

    async def _tell_while_running(self) -> None:
        told, planned, next_ideal = 0, False, 0.0
        while True:
            ended, now = self.ended, time.perf_counter()
            if PromptServer.instance.sockets or ended:
                report = self.report(told)
                told = report["spans_before"] + len(report["spans"])
                plan = self.avatar.stream.plan
                if plan is not None and not planned:
                    report |= self._placement(plan)
                    planned = True
                if plan is not None and self._blocks > 1 and (now > next_ideal or ended):
                    report |= await asyncio.to_thread(self._find_ideal, plan)
                    next_ideal = now + SECONDS_BETWEEN_IDEALS
                PromptServer.instance.send_sync(EVENT, report)
            if ended:
                return
            await asyncio.sleep(SECONDS_BETWEEN_REPORTS)

    def report(self, told: int) -> dict:
        """What changes all the time, with the spans after the first `told`."""
        avatar, monitor = self.avatar, self.avatar.stream.monitor
        now, seen = self._end or time.perf_counter(), monitor.snapshot()
        count, spans = monitor.since(told)
        spans = [span for span in spans if span.end > now - SECONDS_OF_SPANS]
        return {
            "id": self.id,
            "node": self.node,
            "now": now - self._begun,
            "paused": self.hold.paused and not self.ended,
            "ended": self.ended,
            "problem": self._problem,
            "first": self._first,
            "blocks": self._blocks,
            "total": avatar.stream.blocks,
            "late": seen.late,
            "fps": seen.fps,
            "speed": avatar.speech.fps,
            "stages": [{"busy": stage.busy, "waiting": stage.waiting} for stage in seen.stages],
            "memory": dict(seen.memory),
            "spans_before": count - len(spans),
            "spans": _packed(spans, self._begun),
        }

    def everything(self) -> dict:
        """For a page that has heard nothing yet."""
        plan = self.avatar.stream.plan
        report = self.report(0)
        if plan is not None:
            report |= self._placement(plan)
        if self._ideal is not None:
            report |= self._shown_ideal()
        return report

    def _placement(self, plan: Plan) -> dict:
        """What is where, which is known once the model is loaded."""
        memory = host.runtime().memory
        return {
            "plan": plan.name,
            "places": [
                {
                    "device": stage.device,
                    "steps": [stage.steps.start, stage.steps.stop],
                    "layers": [stage.layers.start, stage.layers.stop],
                }
                for stage in plan.stages
            ],
            "decoder": plan.decoder,
            "planned": {} if memory is None else {device: memory.on(device) for device in memory.devices},
        }

    def _find_ideal(self, plan: Plan) -> dict:
        from liveavatar_core.pipeline.timeline import steady

        self._ideal = steady(plan, self.avatar.stream.monitor.spans[-SPANS_IN_IDEAL:])
        return self._shown_ideal()

    def _shown_ideal(self) -> dict:
        spans, seconds = self._ideal
        return {"ideal": {"spans": _packed(spans, 0.0), "seconds": seconds}}


def _packed(spans: Sequence[Span], origin: float) -> list[list]:
    """[stage, kind, block, step, begin, end] of each."""
    return [
        [span.stage, span.kind, span.block, span.step, round(span.begin - origin, 4), round(span.end - origin, 4)]
        for span in spans
    ]


def _complain(telling: Future) -> None:
    if not telling.cancelled() and telling.exception():
        log.error("Live Avatar: the pipeline panel is told nothing more of this run", exc_info=telling.exception())


def cut_short(node: str | None) -> int:
    """How many runs of a node were stopped before their end; the host must not take such a result for the whole."""
    return _cut_short[node or ""]


def add_routes(routes: web.RouteTableDef) -> None:
    routes.get("/liveavatar/pipeline")(_show)
    routes.route("*", "/liveavatar/stream/{id}/{action:pause|resume|stop}")(_act)


async def _show(request: web.Request) -> web.Response:
    return web.json_response(None if _run is None else _run.everything())


async def _act(request: web.Request) -> web.Response:
    if request.method != "POST":  # the host's own files would answer a GET with 404
        raise web.HTTPMethodNotAllowed(request.method, ["POST"])
    if _run is None or _run.ended or _run.id != request.match_info["id"]:
        return web.Response(status=404, text="No such stream is being made.")
    actions = {"pause": _run.hold.pause, "resume": _run.hold.resume, "stop": _run.hold.stop}
    actions[request.match_info["action"]]()
    live.say(_run.id)
    return web.Response(status=204)
