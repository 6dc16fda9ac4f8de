"""One stage in a process of its own: its part of the model, its worker, its links to other processes.

Somebody else starts such processes, anywhere, and calls these methods from another one: in this order, and `give` and
`poll` as often as they like between `begin` and `end`. Arguments and results can be pickled.
"""

import gc
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from liveavatar_core.config import ModelConfig, ModelSpec, SamplingConfig
from liveavatar_core.errors import StageError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.exchange import Incoming, Link, Outgoing, open_links
from liveavatar_core.pipeline.links import Lane, Mark, carry, each, lanes
from liveavatar_core.pipeline.monitor import Monitor, Span
from liveavatar_core.pipeline.plan import PREFILL, Plan, StageSpec
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stage_threads import start
from liveavatar_core.pipeline.worker import POLL, Waiting, Worker
from liveavatar_core.types import Payload
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import WeightReader, open_weights

MEETING = timedelta(seconds=60)  # that processes wait for each other when they meet
ENDING = 2.0  # seconds that a stage in the middle of a hop may take to stop


@dataclass(frozen=True, slots=True)
class Failure:
    """What a StageError says, in parts. `lost`: a link broke, so another process may have died."""

    stage: int
    block: int
    step: int
    reason: str
    lost: bool = False

    def error(self) -> StageError:
        return StageError(self.stage, self.block, self.step, self.reason)


@dataclass(frozen=True, slots=True)
class Report:
    """What has happened since the last one. Seconds are of this process's clock."""

    finished: list[tuple[int, Tensor, float]]  # block, latent in host memory, when
    failure: Failure | None
    at: tuple[int, int]  # block and step of the latest hop
    spans: list[Span]
    waiting: int
    memory: int  # bytes in use on the device


class StageProcess:
    def __init__(self) -> None:
        """Light; the device is not touched."""
        self._store: dist.TCPStore | None = None
        self._loaded: tuple | None = None
        self._model: CausalDiT | None = None
        self._links: list[Link] = []
        self._changed = threading.Condition()
        self._streams = 0  # the present one's number

    # ---- before a stream

    def memory(self) -> int | None:
        """Bytes of this process's GPU; None without one."""
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None

    def clock(self) -> float:
        return time.perf_counter()

    def host(self, address: str, processes: int) -> int:
        """Be the place where all processes meet; the port. `address`: this machine's, as the others see it."""
        self._store = dist.TCPStore(address, 0, processes, is_master=True, wait_for_workers=False, timeout=MEETING)
        return self._store.port

    def meet(self, address: str, port: int, rank: int, plan: Plan, own_address: str) -> None:
        """Connect with the others, which do the same at this moment; what links there were between streams are closed.
        `own_address`: this machine's in the cluster."""
        if dist.is_initialized():
            dist.destroy_process_group()
        interface = _interface_of(own_address)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        count = len(plan.stages)
        store = self._store or dist.TCPStore(address, port, count, is_master=False, timeout=MEETING)
        if plan.stages[rank].device.startswith("cuda"):
            torch.cuda.set_device(0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=MEETING)
        self._links = open_links(plan)

    def load(
        self,
        model: ModelSpec,
        config: ModelConfig,
        spec: StageSpec,
        precision: str,
        open_model: Callable[[Path], WeightReader] = open_weights,
    ) -> int:
        """Have this stage's part of the model here, read by this machine; the bytes it takes."""
        device = "cuda:0" if spec.device.startswith("cuda") else "cpu"  # the one that this process was given
        wanted = model, spec.layers, spec.offload.weights, precision
        if self._loaded != wanted:
            self._loaded = self._model = None
            self._drop_stream()
            gc.collect()
            with ExitStack() as files:
                reader = files.enter_context(open_model(model.checkpoint))
                loras = [files.enter_context(open_lora(lora.path, lora.strength)) for lora in model.loras]
                self._model = load_dit(
                    reader,
                    config,
                    layers=spec.layers,
                    loras=loras,
                    dtype=work_dtype(precision, device),
                    device=device,
                    fp8=precision == "fp8",
                    hosted=spec.offload.weights,
                )
            self._loaded = wanted
        self._device = device
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    # ---- a stream

    def begin(
        self,
        plan: Plan,
        index: int,
        geometry: Geometry,
        sampling: SamplingConfig,
        levels: tuple[float, ...],
        text: Tensor,
        attention: str = "exact",
        kv_cache: str = "full",
    ) -> int:
        """The stream's number, which `give` and `poll` want: calls for the stream before may come late."""
        self._drop_stream()
        self._plan, self._spec = plan, plan.stages[index]
        self._monitor = Monitor()
        with torch.inference_mode():
            stage = Stage(
                replace(self._spec, device=self._device),
                self._model,
                geometry,
                sampling,
                levels,
                text,
                attention=attention,
                kv_cache=kv_cache,
            )
        (lane,) = lanes([stage.device])
        apart = plan.apart if index == 0 else 0
        self._worker = Worker(stage, lane, self._monitor, self._changed, self._has_room, self._pass_on, apart)
        lane.follow_caller()
        self._outgoing = {
            link.target: Outgoing(link, lane, self._changed, self._lost, self._worker.copied)
            for link in self._links
            if link.source == index
        }
        self._incoming = [
            Incoming(link, self._worker, self._changed, self._lost) for link in self._links if link.target == index
        ]
        self._running = start(index, self._work)
        return self._streams

    def give(self, stream: int, payload: Payload) -> None:
        """From the driver, in the order of its calls. What comes late, for a stream that is over, is dropped."""
        if stream != self._streams:
            return
        carried, _, arrived = carry(each(payload, Tensor.cpu), Mark(), Lane(torch.device("cpu")), self._worker.lane)
        self._worker.put(Waiting(carried, None, arrived, time.perf_counter()))

    def poll(self, stream: int, timeout: float) -> Report | None:
        """As soon as there is something to tell, at the latest after `timeout` seconds; None if another has begun."""
        deadline = time.perf_counter() + timeout
        with self._changed:
            while stream == self._streams and not (self._failure or (self._results and self._results[0][2].passed)):
                self._settle()
                left = deadline - time.perf_counter()
                if left <= 0:
                    break
                self._changed.wait(min(left, POLL if self._results else 0.2))
            if stream != self._streams:
                return None
            finished = []
            while self._results and self._results[0][2].passed:
                block, latent, mark = self._results.popleft()
                finished.append((block, latent.cpu(), mark.time))
            at, waiting = self._worker.at, len(self._worker.waiting)
        memory = torch.cuda.memory_allocated(0) if self._device != "cpu" else 0
        return Report(finished, self._failure, at, self._monitor.drain(), waiting, memory)

    def end(self) -> bool:
        """Stop at the next hop and empty the links; whether that was possible in time."""
        self._worker.close()
        for outgoing in self._outgoing.values():
            outgoing.end()
        deadline = time.perf_counter() + ENDING
        wait([self._running], ENDING)
        ended = [end.join(deadline) for end in (*self._outgoing.values(), *self._incoming)]
        self._worker.lane.release_to_caller()
        return all(ended) and self._running.done()

    # ---- inside

    def _drop_stream(self) -> None:
        """Free the memory of the stream before, which there is no room for beside what comes next."""
        with self._changed:
            self._streams += 1
            self._results: deque[tuple[int, Tensor, Mark]] = deque()
            self._failure: Failure | None = None
            self._worker, self._outgoing, self._incoming = None, {}, []

    def _has_room(self, payload: Payload) -> bool:
        row = self._plan.rows[self._spec.row]
        last = self._spec.column + 1 == len(row)
        return last or self._outgoing[row[self._spec.column + 1].index].has_room

    def _pass_on(self, done: Payload, computed: Mark, expected: float) -> None:
        target = self._plan.next_stage(self._spec, done.step)
        if target is None:
            if done.step != PREFILL:
                with self._changed:
                    self._results.append((done.block, done.latent, computed))
                    self._changed.notify_all()
        elif target is self._spec:  # its own stream keeps the order
            self._worker.put(Waiting(done, None, Mark(), time.perf_counter()))
        else:
            self._outgoing[target.index].put(done, computed)

    def _work(self) -> None:
        try:
            self._worker.work()
        except StageError as error:
            self._fail(Failure(error.stage, error.block, error.step, error.reason))

    def _settle(self) -> None:
        try:
            self._worker.settle()
        except StageError as error:
            self._fail(Failure(error.stage, error.block, error.step, error.reason))

    def _lost(self, error: Exception) -> None:
        reason = f"a link to another stage broke ({str(error).splitlines()[0]})"
        self._fail(Failure(self._spec.index, *self._worker.at, reason, lost=True))

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            self._failure = self._failure or failure
        self._worker.close()


def _interface_of(address: str) -> str | None:
    """Name of the network interface with this address; Gloo would take the one that the host's name points to."""
    import psutil  # comes with ComfyUI; named by the ray extra

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == address for entry in addresses):
            return name
    return None
