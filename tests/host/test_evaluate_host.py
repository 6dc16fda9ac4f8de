"""The bench against a real ComfyUI: a set made once and measured, and the node. The pictures are noise."""

import json

import pytest
from test_hostile import small
from test_running import node_of

from launch import ROOT
from liveavatar_core.evaluate import __main__ as command
from training.world import cases

SIDE = 64


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A drawn face of a class with its boxes, and the demo's speech."""
    folder = tmp_path_factory.mktemp("set")
    cases.draw(folder / "pictures", "anime", 1)
    (folder / "sounds").mkdir()
    (folder / "sounds" / "speech.wav").write_bytes((ROOT / "assets" / "speech.wav").read_bytes())
    (folder / "prompts.txt").write_text("anime: A girl talks, neon light\n")
    return folder


def test_a_set_is_made_once_and_measured(server, material, capsys):
    settings = {"ImageLoader.width": SIDE, "ImageLoader.height": SIDE, "AudioEncoder.seconds": 2.2}
    arguments = ["set", ROOT / "workflows" / "api" / "demo.json", "--ablation", "prompt", "--out", material / "out"]
    for name in ("pictures", "sounds", "prompts.txt"):
        arguments += [f"--{name.partition('.')[0]}", material / name]
    arguments = [str(argument) for argument in arguments] + [
        f"--set={name}={value}" for name, value in settings.items()
    ]
    command.main([*arguments, "--server", server.url])
    said = capsys.readouterr()
    assert "making 2 of 2" in said.err and "lips" in said.out and "bare" in said.out and "detailed" in said.out
    found = [json.loads(line) for line in (material / "out" / "figures.jsonl").read_text().splitlines()]
    assert [(line["class"], line["variant"], line["prompt"]) for line in found] == [
        ("anime", "bare", "A girl talks"),
        ("anime", "detailed", "A girl talks, neon light"),
    ]
    assert {"lips", "eyes sharpness", "background kept", "head growth"} < found[0]["figures"].keys()
    assert (material / "out" / "report.html").read_text().count("data:image/jpeg") == 4
    command.main([*arguments, "--server", "http://127.0.0.1:9"])  # nobody there
    assert "making" not in capsys.readouterr().err


def evaluated(**values: object) -> dict:
    workflow = small(AudioEncoder__seconds=2.2, **values)
    sockets = {"video": [node_of(workflow, "Decode"), 0], "image": [node_of(workflow, "ImageLoader"), 0]}
    return workflow | {"evaluate": {"class_type": "LiveAvatar_Evaluate", "inputs": sockets}}


def test_the_node_shows_a_table_and_saves_a_page(run_workflow, server):
    workflow = evaluated()
    workflow["evaluate"]["inputs"]["mouth"] = "20, 30, 44, 44"
    shown = run_workflow(workflow).outputs["evaluate"]
    (text,), (page,) = shown["text"], shown["report"]
    assert "likeness" in text and "lips" in text and page["filename"] in text
    saved = server.base / "output" / page["subfolder"] / page["filename"]
    assert saved.read_text(encoding="utf-8").count("data:image/jpeg") == 2
