"""A real ComfyUI as an object: started headless with the pack, ready when `start` returns, gone after `stop`.

Runs ComfyUI with the interpreter it is used from, in a base directory of its own, so that neither a user's models nor
their settings are touched. What to do with a running server is `liveavatar_core.client`'s business.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import ROOT, LaunchError
from .cache import cache_folder

PACK = "LiveAvatar"
SECONDS_TO_START = 300
SECONDS_TO_STOP = 20
LINES_SHOWN = 30


class Comfy:
    """with Comfy(tree) as server: ... server.url ..."""

    def __init__(
        self,
        tree: Path,
        *,
        base: Path | None = None,
        port: int | None = None,
        log: Path | None = None,
        packs: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`base` is kept afterwards if given; `packs` maps folder names in custom_nodes to sources."""
        self.tree = tree
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._keep_base = base is not None
        self.base = base or _fresh_base()
        self.log = log or self.base / "comfyui.log"
        self.packs = dict(packs or {PACK: ROOT})
        self.arguments = list(arguments)
        self.variables = dict(variables or {})
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Comfy":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> "Comfy":
        _furnish(self.base, self.packs)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "launch" / "serve.py"), str(self.tree), *self._flags()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                # Ctrl-C at the terminal is for us; we then stop the server in order.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the server and everything it started; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
            _kill_with_children(process)
        if not self._keep_base:
            _remove(self.base, self.packs)

    def wait(self) -> None:
        """Return when the server ends by itself."""
        self._process.wait()

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LINES_SHOWN:])

    def _flags(self) -> list[str]:
        import torch

        return [
            *([] if torch.cuda.is_available() else ["--cpu"]),
            *["--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base)],
            # Without these two ComfyUI writes into its own tree and asks its makers' servers.
            *["--database-url", "sqlite:///:memory:", "--disable-api-nodes"],
            *["--disable-auto-launch", "--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs],
            *["--max-upload-size", "4000"],
            *self.arguments,
        ]

    def _environment(self) -> dict[str, str]:
        # PYTHONPATH could offer our `nodes` folder under the name of the host's module.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if cache_folder() not in self.tree.parents:  # somebody's own checkout: leave no compiled files in it
            inherited["PYTHONDONTWRITEBYTECODE"] = "1"
        return {**inherited, **self.variables}

    def _wait_until_ready(self) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise LaunchError(f"ComfyUI ended while starting; the last lines of its log:\n{self.last_lines()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if direct.open(f"{self.url}/system_stats", timeout=5).status == 200:
                    return
            time.sleep(0.2)
        raise LaunchError(
            f"ComfyUI did not answer within {SECONDS_TO_START} s; the last lines of its log:\n{self.last_lines()}"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fresh_base() -> Path:
    folder = cache_folder() / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


def _furnish(base: Path, packs: Mapping[str, Path]) -> None:
    for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, source in packs.items():
        _link(source, base / "custom_nodes" / name)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():  # else the first page opens a dialog of templates over everything
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))


def _link(source: Path, link: Path) -> None:
    """A symbolic link; on a Windows that forbids it a junction; where there is neither, a copy."""
    if os.path.lexists(link):
        return
    with contextlib.suppress(OSError):
        link.symlink_to(source, target_is_directory=True)
        return
    if os.name == "nt":
        made = subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(source)], capture_output=True)
        if made.returncode == 0:
            return
    shutil.copytree(source, link, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", "node_modules"))


def _remove(base: Path, packs: Mapping[str, Path]) -> None:
    for name in packs:  # the links first and by name, so that nothing can follow them into the sources
        link = base / "custom_nodes" / name
        with contextlib.suppress(OSError):
            link.unlink() if link.is_symlink() else link.rmdir()
    shutil.rmtree(base, ignore_errors=True)


def _kill_with_children(process: subprocess.Popen) -> None:
    if os.name == "nt":
        if process.poll() is None:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
