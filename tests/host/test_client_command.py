"""`python -m liveavatar_core.client` against a real server, as a terminal or a script has it."""

import io
import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import pytest

from launch import ROOT
from liveavatar_core.client.__main__ import FAILED, MADE, STOPPED

SECONDS, FRAMES = 1.6, 40  # of a film; four blocks
SECONDS_TO_WAIT = 200
_seeds = itertools.count(11_000)


@pytest.fixture
def client(server, tmp_path):
    """client("--watch", ...) -> the running command, on a film of four blocks that has not been made before."""

    def start(*arguments: object, seconds: float = SECONDS) -> subprocess.Popen:
        small = {"ImageLoader.width": 96, "ImageLoader.height": 64, "AudioEncoder.seconds": seconds}
        values = {**small, "Sampler.seed": next(_seeds)}
        command = [sys.executable, "-m", "liveavatar_core.client", "workflows/api/demo.json", "--server", server.url]
        command += ["--out", tmp_path / "out", *(f"--set={name}={value}" for name, value in values.items())]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*map(str, command), *map(str, arguments)], cwd=ROOT, **pipes)

    return start


def ended(process: subprocess.Popen) -> tuple[int, bytes, list[str]]:
    out, err = process.communicate(timeout=SECONDS_TO_WAIT)
    return process.returncode, out, err.decode().splitlines()


def lines(said: list[str], word: str) -> list[str]:
    return [line.removeprefix(f"{word} ") for line in said if line.startswith(f"{word} ")]


def frames_and_seconds_of_sound(film: str | io.BytesIO) -> tuple[int, float]:
    with av.open(film) as file:
        pictures = sound = 0
        for frame in file.decode(video=0, audio=0):
            if isinstance(frame, av.VideoFrame):
                pictures += 1
            else:
                sound += frame.samples / frame.sample_rate
        return pictures, sound


def test_a_film_from_own_files_is_watched_while_it_is_made(client, tmp_path) -> None:
    """Down a pipe, by FFmpeg's own HTTP reader as in ffplay and VLC, and afterwards from a folder."""
    face = tmp_path / "a face 脸.png"
    face.write_bytes((ROOT / "assets" / "icon.png").read_bytes())
    arguments = ("--set", f"LoadImage.image={face}", "--set", f"Sampler.seed={next(_seeds)}", "--watch")
    process = client(*arguments, "-")
    said = []
    with ThreadPoolExecutor(2) as readers:
        piped = readers.submit(process.stdout.read)
        for line in process.stderr:
            said.append(line.decode().rstrip())
            if said[-1].startswith("stream "):
                opened = readers.submit(frames_and_seconds_of_sound, said[-1].split()[1])
    assert process.wait() == MADE, said
    assert lines(said, "uploaded") == [face.name]
    assert lines(said, "progress") == [f"Decode {block}/4" for block in (1, 2, 3, 4)]
    assert said.index("progress Decode 4/4") > said.index(f"stream {lines(said, 'stream')[0]}")
    (saved,) = lines(said, "saved")
    films = [opened.result(), *map(frames_and_seconds_of_sound, (io.BytesIO(piped.result()), saved))]
    assert {frames for frames, _ in films} == {FRAMES}
    assert all(abs(sound - SECONDS) < 0.05 for _, sound in films)

    code, _, said = ended(client(*arguments, tmp_path / "again.mp4"))
    assert code == MADE and not lines(said, "stream"), "it was made before"
    assert frames_and_seconds_of_sound(str(tmp_path / "again.mp4"))[0] == FRAMES


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of Ctrl-C to one process")
def test_ctrl_c_stops_the_run_and_keeps_what_was_made(client) -> None:
    process = client(seconds=0)
    said = []
    for line in process.stderr:
        said.append(line.decode().rstrip())
        if said[-1].startswith("progress Decode 2/"):
            process.send_signal(signal.SIGINT)
            break
    code, _, rest = ended(process)
    assert code == STOPPED and "stopped" in rest
    (kept,) = lines(rest, "saved")
    assert Path(kept).stem == lines(said, "queued")[0]
    frames, sound = frames_and_seconds_of_sound(kept)
    assert 21 <= frames < 100 and abs(frames / 25 - sound) < 0.1


def test_a_viewer_that_goes_away_leaves_the_run_alone(client) -> None:
    process = client("--watch", "-")
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode().splitlines()
    assert process.wait(SECONDS_TO_WAIT) == MADE
    assert lines(said, "unwatched") and lines(said, "saved")


def test_what_the_server_refuses_is_said(client) -> None:
    code, _, said = ended(client("--set", "LoadImage.image=nobody.png"))
    assert code == FAILED and "LoadImage" in said[-1] and "nobody.png" in said[-1]
