"""Stages in processes of their own, on one machine or several, started and watched by Ray.

Ray starts processes, tells when one dies, and carries requests in and finished latents out; all that passes between
stages goes from process to process without it. The only file that imports Ray, which is an optional extra.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import liveavatar_core
from liveavatar_core.config import ModelConfig, ModelSpec, SamplingConfig
from liveavatar_core.errors import LiveAvatarError, PlanError, StageError
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.monitor import Gauges, Monitor
from liveavatar_core.pipeline.plan import PREFILL, Plan
from liveavatar_core.runtime.process import ENDING, Report, StageProcess
from liveavatar_core.types import BlockRequest, Payload
from liveavatar_core.weights.reader import WeightReader, open_weights

log = logging.getLogger(__name__)

LOCAL = "local"  # in place of an address: a cluster of this machine alone, which ends with this process
STARTING = 300.0  # seconds that processes may take to start, and to meet
MOST = 16  # stages of a local cluster, which is started once; how many CPUs there are does not limit them
LOADING = 3600.0  # seconds that reading the model may take
HEARTBEAT = 0.2  # seconds between two reports of a process that has nothing to tell
SILENT = 10.0  # seconds without a report after which a process counts as gone; Ray itself may need a minute
BLAME = 2.0  # seconds in which the death of a process may show after it has broken another one's link
SHARE = 0.1  # of a CPU beside a GPU, as Ray counts them; a stage without a GPU takes a CPU
STORE = 100 * 2**20  # bytes of Ray's object store, which holds a few requests and latents


class _Process(StageProcess):
    """As Ray starts it."""

    def address(self) -> str:
        """This machine's, as the others of the cluster see it."""
        import ray

        return ray.util.get_node_ip_address()


class Cluster:
    """Processes that keep their parts of the model, and the links between them, as long as streams want the same."""

    def __init__(self, address: str, devices: Sequence[str]) -> None:
        """One process per device, with a GPU to itself if the device is a cuda one, whatever its number. `address`: of
        a cluster, or LOCAL. Raises PlanError if this cannot be had."""
        try:
            import ray
        except ImportError as error:
            raise PlanError("stages in other processes need Ray, which is not installed: pip install ray") from error
        self.address, self.devices = address, tuple(devices)
        self.processes: list = []
        self.addresses: list[str] = []  # of their machines
        self.memory: list[int | None] = []  # bytes of their GPUs
        self._ray, self._met, self._group = ray, None, None  # _met: the plan they are linked for
        try:
            _connect(ray, address, len(devices))
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray = self._ray
        needs = [{"CPU": SHARE, "GPU": 1} if device.startswith("cuda") else {"CPU": 1} for device in self.devices]
        self._group = placement_group(needs, "PACK")
        if not self._group.wait(STARTING):
            there = ray.cluster_resources()
            raise PlanError(
                f"{len(needs)} processes with {sum('GPU' in need for need in needs)} GPUs in all cannot be placed: the "
                f"cluster has {there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPUs, and too few are free"
            )
        actor = ray.remote(concurrency_groups={"give": 1, "poll": 1})(_Process)
        self.processes = [
            actor.options(
                num_cpus=need["CPU"],
                num_gpus=need.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            ).remote()
            for index, need in enumerate(needs)
        ]
        addresses = self.all(lambda process, index: process.address.remote(), STARTING)
        if all(need == needs[0] for need in needs):  # neighbours on one machine, ours first
            here = ray.util.get_node_ip_address()
            order = sorted(range(len(needs)), key=lambda i: (addresses[i] != here, addresses[i]))
            self.processes = [self.processes[i] for i in order]
            addresses = [addresses[i] for i in order]
        self.addresses = addresses
        self.memory = self.all(lambda process, index: process.memory.remote(), STARTING)
        log.info("%d processes on %s", len(needs), ", ".join(dict.fromkeys(addresses)))

    def all(self, call: Callable, timeout: float) -> list:
        """Results of `call(process, index)` of all at the same time. What a process raises for a reader is raised here;
        for anything else PlanError, and then this is closed."""
        ray = self._ray
        deadline = time.monotonic() + timeout
        results = []
        for index, ref in enumerate([call(process, index) for index, process in enumerate(self.processes)]):
            try:
                results.append(ray.get(ref, timeout=max(0.0, deadline - time.monotonic())))
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, LiveAvatarError):
                    raise cause from error
                self.close()
                raise PlanError(f"stage {index} cannot be made ready: {_reason(error, ray)}") from error
        return results

    def ensure(
        self,
        plan: Plan,
        model: ModelSpec,
        config: ModelConfig,
        precision: str,
        open_model: Callable[[Path], WeightReader] = open_weights,
    ) -> None:
        """Have every process know the others and hold its part of the model; each machine reads its own files.

        `plan` has one stage per process. Raises what `all` does.
        """
        if self._met != plan:
            first = self.addresses[0]
            port = self._ray.get(self.processes[0].host.remote(first, len(self.processes)))
            self.all(lambda p, i: p.meet.remote(first, port, i, plan, self.addresses[i]), STARTING)
            self._met = plan
        self.all(lambda p, i: p.load.remote(model, config, plan.stages[i], precision, open_model), LOADING)

    def serves(self, address: str, devices: Sequence[str]) -> bool:
        """Whether a stream needs no other processes than these."""
        return bool(self.processes) and (address, tuple(devices)) == (self.address, self.devices)

    def pipeline(
        self,
        plan: Plan,
        geometry: Geometry,
        sampling: SamplingConfig,
        levels: tuple[float, ...],
        text: Tensor,
        formats: tuple[str, str],
        monitor: Monitor | None,
    ) -> "ClusterPipeline":
        """For one stream; `levels` as in Stage, `formats`: attention and kv_cache as in RuntimeSpec."""
        return ClusterPipeline(self, plan, (geometry, sampling, levels, text.cpu(), *formats), monitor)

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process in self.processes:
            self._ray.kill(process)
        self.processes = []
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None


_connected: str | None = None  # the cluster of this process; Ray allows one, and starting takes seconds


def _connect(ray, address: str, processes: int) -> None:
    """Until the process ends, or another address is wanted. A connection that somebody else has made is left alone."""
    global _connected
    if ray.is_initialized():
        if _connected in (None, address):
            return
        ray.shutdown()
    settings = {"log_to_driver": False, "configure_logging": False}
    settings["runtime_env"] = {"py_modules": [str(Path(liveavatar_core.__file__).parent)]}  # the same code for all
    if address == LOCAL:
        settings |= {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": max(processes, MOST)}
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlanError(f"no Ray cluster answers at {address!r} ({error}); start one with ray start --head") from error
    _connected = address


def _reason(error: Exception, ray) -> str:
    """What a reader needs of an error that came through Ray."""
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its process has died ({str(error).splitlines()[0]})"
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return "its process does not answer"
    cause = getattr(error, "cause", None) or error
    return str(cause) or repr(cause)


class ClusterPipeline:
    """Runs one stream on the processes of a cluster; used like a ThreadedPipeline."""

    def __init__(self, cluster: Cluster, plan: Plan, settings: tuple, monitor: Monitor | None) -> None:
        """`settings`: what `StageProcess.begin` takes after plan and stage."""
        self.plan, self.monitor = plan, monitor or Monitor()
        self._cluster, self._ray, self._settings = cluster, cluster._ray, settings
        self._results: deque[tuple[int, Tensor]] = deque()
        self._polls: dict = {}  # reference of a report to come -> stage
        self._at = [(PREFILL, PREFILL)] * len(plan.stages)
        self._waiting = [0] * len(plan.stages)
        self._memory = [0] * len(plan.stages)
        self._suspect: tuple[StageError, float] | None = None  # whose link broke, and when that was heard

    def __enter__(self) -> "ClusterPipeline":
        self._streams = self._cluster.all(lambda p, i: p.begin.remote(self.plan, i, *self._settings), STARTING)
        self._offsets = []  # from their clocks to ours
        for process in self._cluster.processes:
            before = time.perf_counter()
            theirs = self._ray.get(process.clock.remote())
            self._offsets.append((before + time.perf_counter()) / 2 - theirs)
        self._heard = [time.monotonic()] * len(self.plan.stages)
        for stage in range(len(self.plan.stages)):
            self._poll(stage)
        self.monitor.watch(self._gauges)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop at the next hop. Processes that cannot are ended, and with them all; the next stream starts new ones."""
        self.monitor.watch(Gauges)
        refs = [process.end.remote() for process in self._cluster.processes]
        ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=ENDING + 1) if refs else ([], [])
        try:
            clean = len(ended) == len(refs) and all(self._ray.get(ended))
        except self._ray.exceptions.RayError:
            clean = False
        if not clean:
            self._cluster.close()

    def prefill(self, version: int, reference: Tensor, motion: Tensor) -> None:
        """Compute a version of the attention sink on every stage. Blocks that look at it wait for it by themselves."""
        condition = reference.cpu(), motion.cpu()
        for row in self.plan.rows:
            self._give(row[0].index, Payload(block=PREFILL, step=PREFILL, sink=version, condition=condition))

    def submit(self, request: BlockRequest) -> None:
        payload = Payload(block=request.block, step=0, sink=request.sink, request=request)
        self._give(self.plan.rows[0][0].index, payload)

    def result(self, timeout: float) -> tuple[int, Tensor] | None:
        """The next finished block, in order, as (block, latent); None if none came in time. Raises StageError."""
        deadline = time.monotonic() + timeout
        while not self._results:
            left = deadline - time.monotonic()
            if self._suspect is not None and (not self._polls or time.monotonic() > self._suspect[1] + BLAME):
                raise self._suspect[0]
            if left <= 0:
                return None
            # Whatever is there counts before anybody is called silent: the driver may not have asked for long.
            there, _ = self._ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
            for ref in there or self._ray.wait(list(self._polls), num_returns=1, timeout=left)[0]:
                self._hear(self._polls.pop(ref), ref)
            self._check_silence()
        return self._results.popleft()

    def _give(self, stage: int, payload: Payload) -> None:
        process = self._cluster.processes[stage]
        process.give.options(concurrency_group="give").remote(self._streams[stage], payload)

    def _poll(self, stage: int) -> None:
        process = self._cluster.processes[stage]
        self._polls[process.poll.options(concurrency_group="poll").remote(self._streams[stage], HEARTBEAT)] = stage

    def _hear(self, stage: int, ref) -> None:
        try:
            report: Report = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            raise StageError(stage, *self._at[stage], _reason(error, self._ray)) from error
        self._heard[stage] = time.monotonic()
        offset = self._offsets[stage]
        self._at[stage], self._waiting[stage], self._memory[stage] = report.at, report.waiting, report.memory
        for span in report.spans:
            self.monitor.add(replace(span, begin=span.begin + offset, end=span.end + offset))
        for block, latent, when in report.finished:
            self.monitor.finished(block, when + offset)
            self._results.append((block, latent))
        if report.failure is None:
            self._poll(stage)
        elif not report.failure.lost:
            raise report.failure.error()
        elif self._suspect is None:
            self._suspect = report.failure.error(), time.monotonic()

    def _check_silence(self) -> None:
        for stage in self._polls.values():
            if time.monotonic() - self._heard[stage] > SILENT:
                reason = f"nothing has been heard of its process for {SILENT:g} s; it or its machine is gone"
                raise StageError(stage, *self._at[stage], reason)

    def _gauges(self) -> Gauges:
        memory: Counter[str] = Counter()
        for stage, nbytes in zip(self.plan.stages, self._memory, strict=True):
            memory[stage.device] += nbytes
        return Gauges(tuple(self._waiting), +memory)
