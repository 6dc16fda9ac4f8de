"""What of the client needs no server: workflows as files, settings as typed, progress, and its words when it cannot."""

import json
import socket
import subprocess
import sys

import pytest

from launch import ROOT
from liveavatar_core.client.__main__ import FAILED, NO_SERVER, WRONG, main, place
from liveavatar_core.client.connection import _explain
from liveavatar_core.client.workflow import Progress, find, patch, read, typed
from liveavatar_core.errors import InputError, OutputError

WORKFLOW = {
    "7": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "8": {
        "class_type": "LiveAvatar_Sampler",
        "inputs": {"seed": 1, "strength": 1.0, "exact": True, "image": ["7", 0]},
    },
}


def test_patch_goes_by_class_and_leaves_the_original() -> None:
    assert patch(WORKFLOW, {("LoadImage", "image"): "b.png"})["7"]["inputs"] == {"image": "b.png"}
    assert WORKFLOW["7"]["inputs"] == {"image": "a.png"}
    with pytest.raises(InputError, match="no node LoadAudio; it has LoadImage, Sampler"):
        patch(WORKFLOW, {("LoadAudio", "audio"): "b.wav"})


def test_nodes_are_found_by_id_and_by_class_with_and_without_prefix() -> None:
    assert find(WORKFLOW, "8") == find(WORKFLOW, "LiveAvatar_Sampler") == find(WORKFLOW, "Sampler") == ["8"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("seed", "12", 12), ("seed", "1.5", 1.5), ("strength", "0.5", 0.5), ("exact", "False", False)],
)
def test_a_typed_value_takes_the_type_of_the_one_before(name: str, text: str, value: object) -> None:
    got = typed(WORKFLOW, "8", name, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("seed", "one", r"Sampler\.seed is 'one'; it must be a number"),
        ("exact", "maybe", r"Sampler\.exact is 'maybe'; it must be true or false"),
        ("image", "b.png", r"Sampler\.image comes from another node"),
        ("sead", "1", r"no input Sampler\.sead; the node has seed, strength, exact, image"),
    ],
)
def test_settings_that_cannot_be_are_named(name: str, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        typed(WORKFLOW, "8", name, text)


def test_only_the_api_form_is_read(tmp_path) -> None:
    assert read(ROOT / "workflows" / "api" / "demo.json")
    with pytest.raises(InputError, match=r"demo\.json is not a workflow in API form"):
        read(ROOT / "workflows" / "demo.json")
    (tmp_path / "cut.json").write_text('{"7": ')
    with pytest.raises(InputError, match=r"cut\.json is no workflow that can be read"):
        read(tmp_path / "cut.json")


def test_progress_is_one_line_per_step() -> None:
    progress = Progress({"5": {"class_type": "LiveAvatar_Decode", "inputs": {}}})
    lines = []
    for value in (0, 1, 1, 2):
        nodes = {"5": {"value": value, "max": 2}, "6": {"value": 1, "max": 1}}
        lines += progress.news("progress_state", {"nodes": nodes})
    assert lines == ["Decode 1/2", "Decode 2/2"]
    assert progress.news("executed", {}) == []


def test_refusals_are_one_line_per_reason() -> None:
    error = {"message": "Value not in list", "details": "image: 'x' not in []"}
    refusal = {"error": {}, "node_errors": {"3": {"class_type": "LoadImage", "errors": [error]}}}
    assert _explain(refusal).endswith("LoadImage (node 3): Value not in list: image: 'x' not in []")
    assert "Node 'X' not found." in _explain({"error": {"message": "Node 'X' not found.", "details": "#1"}})


def test_results_stay_below_the_folder(tmp_path) -> None:
    """Those of two nodes often have one name, and a server could say anything."""
    assert place(tmp_path, {"subfolder": "video", "filename": "a.mp4"}) == tmp_path / "video" / "a.mp4"
    for subfolder, name in (("..", "a.mp4"), ("", "../a.mp4"), ("/etc", "a.mp4"), ("video/../..", "a.mp4")):
        with pytest.raises(OutputError, match="not below its output folder"):
            place(tmp_path, {"subfolder": subfolder, "filename": name})


def test_the_command_says_what_is_wrong(tmp_path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(WORKFLOW))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        assert main([str(file), "--server", address]) == NO_SERVER
    assert main([str(file), "--set", "seed=1"]) == WRONG
    assert main([str(tmp_path / "none.json")]) == WRONG
    assert main([str(file), "--watch", str(tmp_path / "no" / "folder.mp4")]) == FAILED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error ") for line in lines)
    assert f"no ComfyUI answers at http://{address}" in lines[0]
    assert "--set seed=1 is not NODE.INPUT=VALUE" in lines[1]


def test_without_aiohttp_the_command_says_so(tmp_path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['aiohttp'] = None\n"
        "from liveavatar_core.client.__main__ import main; sys.exit(main(['workflow.json']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == WRONG
    assert done.stderr == "error aiohttp is missing, which comes with ComfyUI: pip install aiohttp\n"
