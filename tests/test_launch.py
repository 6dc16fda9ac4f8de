"""What of launch/ can be tested without a network: paths, options, the lock, the server's life with a stand-in host."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import run
from launch import ROOT, LaunchError, demo, environment
from launch.cache import cache_folder, locked
from launch.comfy import Comfy

# Answers like ComfyUI as far as `Comfy` asks, and says which folder it was given.
STAND_IN_HOST = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

print("packs:", *sorted(p.name for p in Path(value("--base-directory"), "custom_nodes").iterdir()))
try:
    HTTPServer((value("--listen"), int(value("--port"))), Answer).serve_forever()
except KeyboardInterrupt:
    print("stopped in order")
"""


def stand_in(folder: Path, program: str = STAND_IN_HOST) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text(program)
    return folder


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1)
    except (urllib.error.URLError, OSError):
        return False
    return True


def test_command_line_needs_only_the_standard_library() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run; sys.exit(run.main('help'))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run.py demo" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="paths of other systems")
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIVEAVATAR_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("LIVEAVATAR_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library/Caches/wan-live-avatar"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "wan-live-avatar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/wan-live-avatar"


def test_lock_waits_for_the_holder_and_survives_its_death(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    program = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from launch.cache import locked; from pathlib import Path\n"
        f"with locked(Path({str(tmp_path / 'lock')!r}), ''):\n"
        "    print('held', flush=True); time.sleep(1); os._exit(1)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with locked(tmp_path / "lock", "waiting"):
        assert holder.wait(1) == 1
    holder.stdout.close()
    assert capsys.readouterr().out == "waiting\n"


def test_requirements_are_those_of_pyproject_and_of_the_host(tmp_path: Path) -> None:
    assert {"diffusers", "peft", "librosa", "pytest", "ruff"} <= set(environment._own_requirements())
    (tmp_path / "requirements.txt").write_text("torch\ntorchsde\ntorchvision\n\n# note\naiohttp>=3.11.8\nspandrel\n")
    assert environment._host_requirements(tmp_path) == ["torchsde", "aiohttp>=3.11.8"]


def test_failed_set_up_leaves_nothing_half_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = stand_in(tmp_path / "comfyui")
    (tree / "requirements.txt").write_text("aiohttp\n")
    settings = {"LIVEAVATAR_CACHE": tmp_path / "cache", "COMFYUI_PATH": tree, "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(LaunchError, match="Installing torch failed"):
        environment.prepare()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIVEAVATAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(LaunchError, match="COMFYUI_PATH is .*nowhere"):
        environment.prepare()
    monkeypatch.setenv("COMFYUI_PATH", str(stand_in(tmp_path / "comfyui")))
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "no python"))
    with pytest.raises(LaunchError, match="COMFYUI_PYTHON is .*no python"):
        environment.prepare()


def test_demo_options_survive_the_change_of_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a picture.png").touch()
    monkeypatch.chdir(tmp_path)
    options = demo.parse(["--image", "a picture.png", "--prompt", "-- smiling", "--seconds", "1.5", "--open"])
    monkeypatch.chdir("/")
    assert options.image == tmp_path / "a picture.png"
    assert demo.parse(demo.as_arguments(options)) == options


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "none.png"], r"--image none\.png is not a file\."),
        (["--audio", "none.wav"], r"--audio none\.wav is not a file\."),
        (["--seconds", "0"], r"--seconds 0 must be more than 0\."),
        (["--seconds", "nan"], r"--seconds nan must be more than 0\."),
    ],
)
def test_demo_refuses_in_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=f"^{sentence}$"):
        demo.parse(arguments)


def test_server_starts_with_the_pack_and_stops_in_order(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with Comfy(stand_in(tmp_path / "comfyui"), base=base) as server:
        assert answers(f"{server.url}/system_stats")
        assert (base / "custom_nodes" / "LiveAvatar" / "pyproject.toml").is_file()
    assert not answers(server.url)
    assert server.last_lines() == "packs: LiveAvatar\nstopped in order"
    server.stop()


def test_server_removes_its_own_base_and_not_the_pack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIVEAVATAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "kept.py").touch()
    with Comfy(stand_in(tmp_path / "comfyui"), packs={"P": tmp_path / "pack"}) as server:
        assert (server.base / "custom_nodes" / "P" / "kept.py").exists()
    assert not server.base.exists()
    assert (tmp_path / "pack" / "kept.py").exists()


def test_server_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    tree = stand_in(tmp_path / "comfyui", "raise SystemExit('no torchvision here')")
    with pytest.raises(LaunchError, match="no torchvision here"):
        Comfy(tree, base=tmp_path / "base").start()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_no_server_survives_its_starter(tmp_path: Path) -> None:
    tree = stand_in(tmp_path / "comfyui")
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from launch.comfy import Comfy; from pathlib import Path\n"
        f"print(Comfy(Path({str(tree)!r}), base=Path({str(tmp_path / 'base')!r})).start().url, flush=True)\n"
        "time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    url = starter.stdout.readline().strip()
    assert answers(url)
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    deadline = time.monotonic() + 10
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


def test_the_recordings_option_reaches_pytest_as_it_is_typed(tmp_path: Path) -> None:
    """A directory outside the clone, as a word of its own: pytest alone takes that for a folder of tests."""
    few = [f"--ignore-glob=*/{others}" for others in ("test_[!g]*.py", "test_g[!e]*.py")]  # take seconds to import
    typed = ["-k", "test_fitted_sizes", *few, "--golden", str(tmp_path), "--collect-only", "-q"]
    arguments = run.with_values_joined(typed)
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "test_geometry.py::test_fitted_sizes" in done.stdout, done.stdout + done.stderr
    assert run.with_values_joined(["--golden=here", "x"]) == ["--golden=here", "x"]
