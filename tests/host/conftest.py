"""A real ComfyUI with the pack for the tests of this folder, and a real browser to look at it.

`python run.py test` sets LIVEAVATAR_COMFYUI; run by other means, without it, the tests here are skipped. On a machine
with CI=true nothing may be missing: there, what would be a skip elsewhere is a failure.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from real_names import furnish_models

from launch import ROOT
from launch.cache import cache_folder, locked
from launch.comfy import PACK, Comfy
from liveavatar_core.client.connection import Client

HERE = Path(__file__).parent
WORKFLOWS = ROOT / "workflows"
SECONDS_PER_WORKFLOW = 600

# For the servers: tiny models gain nothing from a second thread and lose a lot to it when the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def absent(what: str) -> None:
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots and logs go: LIVEAVATAR_ARTEFACTS, else pytest's temporary folder."""
    chosen = os.environ.get("LIVEAVATAR_ARTEFACTS")
    folder = Path(chosen).resolve() if chosen else tmp_path_factory.mktemp("artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, artefacts: Path):
    """ComfyUI with the pack, and tiny models under the names that the workflows ask for."""
    tree = os.environ.get("LIVEAVATAR_COMFYUI")
    if not tree:
        absent("no ComfyUI: LIVEAVATAR_COMFYUI is not set; `python run.py test` sets it")
    base = tmp_path_factory.mktemp("comfyui")
    sizes = furnish_models(base / "models", WORKFLOWS / "api")
    (base / "tiny_host.json").write_text(json.dumps(sizes))
    with Comfy(
        Path(tree),
        base=base,
        log=artefacts / "comfyui.log",
        packs={PACK: untrained(base / "pack"), "TinyHost": HERE / "tiny_host", "HandMade": HERE / "hand_made"},
        variables={"LIVEAVATAR_TINY_HOST": str(base / "tiny_host.json")},
    ) as running:
        yield running


def untrained(folder: Path) -> Path:
    """The pack but for its trained model, so that the demo is the tiny random one."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name != "models":
            (folder / entry.name).symlink_to(entry)
    return folder


@dataclass
class Run:
    """What one run of a workflow gave: outputs by node id, the messages of the websocket, the files it saved."""

    outputs: dict[str, dict] = field(default_factory=dict)
    events: list[tuple[str, dict]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture
def run_workflow(server: Comfy) -> Callable[[dict], Run]:
    """run_workflow(api_workflow) -> Run; raises WorkflowFailed with ComfyUI's reason."""

    async def run(workflow: dict) -> Run:
        result = Run()
        async with Client(server.url) as client:
            result.outputs = await client.run(workflow, lambda kind, data: result.events.append((kind, data)))
            for output in result.outputs.values():
                for file in output.get("images", []) + output.get("audio", []):
                    result.files[file["filename"]] = await client.fetch(file)
        return result

    return lambda workflow: asyncio.run(asyncio.wait_for(run(workflow), SECONDS_PER_WORKFLOW))


@pytest.fixture(scope="session")
def browse() -> Callable[..., dict]:
    """browse("script.mjs", *arguments) -> the JSON that a script of browser/ prints."""
    node, npm, chromium = shutil.which("node"), shutil.which("npm"), find_chromium()
    if not (node and npm):
        absent("no Node.js: the browser tests need node and npm on the PATH")
    if not chromium:
        absent("no Chromium: the browser tests need Chromium, Chrome or Edge, or its path in LIVEAVATAR_CHROMIUM")
    variables = {**os.environ, "CHROMIUM": chromium, "PLAYWRIGHT": str(install_playwright(npm))}

    def browse(script: str, *arguments: object) -> dict:
        command = [node, str(HERE / "browser" / script), *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, f"{script} failed:\n{done.stderr[-3000:]}"
        return json.loads(done.stdout)

    return browse


def find_chromium() -> str | None:
    chosen = os.environ.get("LIVEAVATAR_CHROMIUM")
    if chosen:
        return chosen
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    places = [shutil.which(name) for name in names]
    if sys.platform == "darwin":
        places += [f"/Applications/{name}.app/Contents/MacOS/{name}" for name in ("Google Chrome", "Chromium")]
    for root in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if root in os.environ:
            programs = ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
            places += [f"{os.environ[root]}/{program}" for program in programs]
    return next((place for place in places if place and Path(place).is_file()), None)


def install_playwright(npm: str) -> Path:
    """The driver of the browser, in the cache folder: the clone stays clean and the second run needs no network."""
    wanted = (HERE / "browser" / "package.json").read_text()
    (version,) = json.loads(wanted)["dependencies"].values()
    folder = cache_folder() / f"browser-{version}"
    stamp = folder / "complete"
    with locked(cache_folder() / "lock-browser", "Another run is installing the browser driver; waiting for it."):
        if not stamp.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "package.json").write_text(wanted)
            subprocess.run([npm, "install", "--silent", "--no-audit", "--no-fund"], cwd=folder, check=True)
            stamp.touch()
    return folder
