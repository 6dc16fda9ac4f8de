"""Two machines as two network namespaces of this one: a Ray cluster across them, and the loss of one of them."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAD, WORKER = "10.77.0.1", "10.77.0.2"
PORT = 6399
MACHINES = [f"liveavatar{os.getpid()}{which}" for which in "ab"]

DRIVER = """
import json, subprocess, sys
from pathlib import Path
import torch
from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_dit
from liveavatar_core.errors import StageError
from liveavatar_core.geometry import Geometry
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.types import BlockRequest, Conditioning

folder, address, other = sys.argv[1:]
torch.set_num_threads(1)
geometry, sampling, config = Geometry(64, 64), SamplingConfig(seed=3), DEMO_CONFIG
write_dit(DemoFiles(Path(folder)), seed=0)
model = ModelSpec(DemoFiles(Path(folder)).shards)
draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(5))
conditioning = Conditioning(draw(5, config.text_dim), draw(16, 1, 8, 8), draw(16, 19, 8, 8))
request = lambda n: BlockRequest(n, draw(1, config.audio_states, config.audio_dim, 12) + n)
runtime = Runtime()

def run(spec, after=lambda block: None):
    plan = runtime.ensure(model, config, spec, sampling.evaluations, geometry=geometry)
    made = []
    for block, latent in runtime.latents(plan, geometry, sampling, conditioning, request, 9, lambda: False):
        made.append(latent)
        after(block)
    return made

def lose_the_other(block):
    if block == 3:
        pids = subprocess.run(["ip", "netns", "pids", other], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *pids])

equal = lambda a, b: len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
want = run(RuntimeSpec(("cpu",)))
both = RuntimeSpec(("cpu",) * 4, "ring", cluster=address)
report = {"equal": equal(run(both), want), "machines": runtime._cluster.addresses}
try:
    run(both, lose_the_other)
    report["error"] = "none"
except StageError as error:
    report["error"], report["stage"] = str(error), error.stage
report["afterwards"] = equal(run(RuntimeSpec(("cpu",) * 2, "ring", cluster=address)), want)
print(json.dumps(report))
"""


def on(machine: str, *command: str, timeout: float = 120) -> str:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        ["ip", "netns", "exec", machine, *command], env=settings, capture_output=True, text=True, timeout=timeout
    )
    assert found.returncode == 0, f"{command}: {found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return found.stdout


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def machines():
    if getattr(find_spec("ray"), "origin", None) is None:  # which a mere folder of that name has not
        pytest.skip("Ray is not installed: pip install ray")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces cannot be made here: there is no iproute2")
    a, b = MACHINES
    try:
        made = ip("netns", "add", a) and ip("netns", "add", b)
        if not made or not ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "eth0", "netns", b):
            pytest.skip("network namespaces, or a link between two, cannot be made here: that takes root and veth")
        for machine, address in ((a, HEAD), (b, WORKER)):
            assert ip("-n", machine, "addr", "add", f"{address}/24", "dev", "eth0")
            assert ip("-n", machine, "link", "set", "lo", "up") and ip("-n", machine, "link", "set", "eth0", "up")
        yield a, b
    finally:
        for machine in MACHINES:
            pids = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True).stdout.split()
            if pids:
                subprocess.run(["kill", "-9", *pids])
            ip("netns", "del", machine)


def test_two_machines_give_the_same_bits_and_one_may_be_lost(machines, tmp_path):
    head, worker = machines
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=2", "--num-gpus=0"]
    ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
    folder = Path(f"/tmp/la{os.getpid()}")  # sockets lie there, whose names must be short
    try:
        on(
            head,
            *ray,
            "--head",
            f"--node-ip-address={HEAD}",
            f"--port={PORT}",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
        )
        on(worker, *ray, f"--address={HEAD}:{PORT}", f"--node-ip-address={WORKER}")
        out = on(head, sys.executable, "-c", DRIVER, str(tmp_path), f"{HEAD}:{PORT}", worker, timeout=400)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = json.loads(out.splitlines()[-1])
    assert report["equal"] and report["machines"] == [HEAD, HEAD, WORKER, WORKER]
    assert report["stage"] in (2, 3) and "process" in report["error"], report["error"]
    assert report["afterwards"], "two stages still fit on the machine that is left"
