"""What a run does in ComfyUI besides ending: caching, replay, interruption, sockets of stock nodes."""

import asyncio
import io
import json
import time
import urllib.request
from pathlib import Path

import av
import numpy
import pytest
from test_hostile import small

from launch.comfy import Comfy
from liveavatar_core.client.connection import Client, WorkflowFailed

PREVIEW = b"\0\0\0\4"  # a picture with metadata, among the binary messages of ComfyUI's websocket


def nodes_run(run) -> set[str]:
    """Ids of nodes that were executed rather than taken from the cache."""
    started = {data["node"] for kind, data in run.events if kind == "executing" and data["node"]}
    cached = {node for kind, data in run.events if kind == "execution_cached" for node in data["nodes"]}
    return started - cached


def the_video(run) -> bytes:
    (content,) = (content for name, content in run.files.items() if name.endswith(".mp4"))
    return content


def pictures(content: bytes) -> numpy.ndarray:
    with av.open(io.BytesIO(content)) as file:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def node_of(workflow: dict, class_type: str) -> str:
    (node,) = (key for key, node in workflow.items() if node["class_type"] == f"LiveAvatar_{class_type}")
    return node


def test_the_same_workflow_runs_once(run_workflow):
    workflow = small(Sampler__seed=101)
    first, again = run_workflow(workflow), run_workflow(workflow)
    assert node_of(workflow, "Decode") in nodes_run(first)
    assert nodes_run(again) == set()
    assert the_video(first) == the_video(again)


def test_another_decode_replays_the_same_latents(run_workflow):
    """Only the decoder runs again; the sampler's stream hands out the latents it kept."""
    workflow = small(Sampler__seed=102)
    first = run_workflow(workflow)
    changed = small(Sampler__seed=102, Decode__filename_prefix="video/again")
    again = run_workflow(changed)
    assert nodes_run(again) == {node_of(workflow, "Decode")}
    assert numpy.array_equal(pictures(the_video(first)), pictures(the_video(again)))


def test_changed_inputs_run_again(run_workflow):
    workflow = small(Sampler__seed=103)
    first = run_workflow(workflow)
    for change in ({"Sampler__seed": 104}, {"PromptConditioner__text": "another prompt"}, {"Sampler__steps": 2}):
        again = run_workflow(small(**{"Sampler__seed": 103, **change}))
        assert {node_of(workflow, "Sampler"), node_of(workflow, "Decode")} <= nodes_run(again), change
        assert not numpy.array_equal(pictures(the_video(first)), pictures(the_video(again))), change


def test_progress_and_previews_arrive_block_by_block(run_workflow):
    workflow = small(Sampler__seed=105, AudioEncoder__seconds=1.0)
    run = run_workflow(workflow)
    decode = node_of(workflow, "Decode")
    states = [
        data["nodes"][decode] for kind, data in run.events if kind == "progress_state" and decode in data["nodes"]
    ]
    assert {state["value"] for state in states} >= {1, 2, 3} and states[-1]["max"] == 3
    pictures = [data for kind, data in run.events if kind == "preview" and data["bytes"].startswith(PREVIEW)]
    assert len(pictures) == 2, "one after each block but the last, whose place the video takes"


def test_interrupt_keeps_what_was_made(server: Comfy, run_workflow):
    """Stop in the middle of a long run: it ends at once, and the file on disk plays with its sound."""
    workflow = small(Sampler__seed=106, AudioEncoder__seconds=0, Decode__filename_prefix="video/stopped")
    decode = node_of(workflow, "Decode")
    stopped_at: list[float] = []

    async def run_and_stop() -> None:
        async with Client(server.url) as client, Client(server.url) as other:
            loop = asyncio.get_running_loop()

            def watch(kind: str, data: dict) -> None:
                if kind == "progress_state" and decode in data["nodes"] and data["nodes"][decode]["value"] == 2:
                    stopped_at.append(time.monotonic())
                    loop.create_task(other.interrupt())

            await client.run(workflow, watch)

    with pytest.raises(WorkflowFailed, match="interrupted at LiveAvatar_Decode"):
        asyncio.run(run_and_stop())
    assert time.monotonic() - stopped_at[0] < 20
    (path,) = (server.base / "output" / "video").glob("stopped*.mp4")
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
        sound = file.streams.audio[0]
        heard = float(sound.duration * sound.time_base)
    assert 21 <= frames < 100
    assert abs(frames / 25 - heard) <= 1 / 25
    assert the_video(run_workflow(small(Sampler__seed=107))), "the next run works"


def test_frames_and_sound_for_stock_nodes(run_workflow):
    workflow = small(Sampler__seed=108)
    decode = workflow.pop(node_of(workflow, "Decode"))
    inputs = {"stream": decode["inputs"]["stream"], "vae": decode["inputs"]["vae"]}
    workflow |= {
        "frames": {"class_type": "LiveAvatar_DecodeFrames", "inputs": inputs},
        "video": {
            "class_type": "CreateVideo",
            "inputs": {"images": ["frames", 0], "audio": ["frames", 1], "fps": ["frames", 2]},
        },
        "save": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["video", 0], "filename_prefix": "video/stock", "format": "auto", "codec": "auto"},
        },
    }
    assert pictures(the_video(run_workflow(workflow))).shape == (13, 64, 96, 3)


def test_the_prompt_that_is_sent_can_be_seen(run_workflow):
    text = {"text": "A dwarf in a forge, warm lighting.", "style": "Pixar style", "lighting": "warm lighting"}
    workflow = {
        "demo": {"class_type": "LiveAvatar_DemoLoader", "inputs": {}},
        "prompt": {
            "class_type": "LiveAvatar_PromptConditioner",
            "inputs": {"clip": ["demo", 1], "action": "laughing heartily", **text},
        },
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["prompt", 1]}},
    }
    (shown,) = run_workflow(workflow).outputs["show"]["text"]
    assert shown == "A dwarf in a forge, warm lighting, laughing heartily, Pixar style", "each helper once"


def test_unload_frees_and_the_next_run_loads_again(run_workflow):
    workflow = small(Sampler__seed=109)
    video = run_workflow(workflow)
    unload = {"unload": {"class_type": "LiveAvatar_Unload", "inputs": {"after": [node_of(workflow, "Decode"), 0]}}}
    run_workflow(workflow | unload)
    again = run_workflow(small(Sampler__seed=109, Decode__filename_prefix="video/after"))
    assert numpy.array_equal(pictures(the_video(video)), pictures(the_video(again)))


def test_the_unload_button_takes_the_weights_back(server: Comfy, run_workflow):
    """ComfyUI's own button, as an HTTP request; it acts between two prompts."""
    gone = "Live Avatar gave back"
    run_workflow(small(Sampler__seed=110))
    before = server.log.read_text(errors="replace").count(gone)
    request = urllib.request.Request(
        f"{server.url}/api/free", json.dumps({"unload_models": True}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    deadline = time.monotonic() + 120
    while server.log.read_text(errors="replace").count(gone) == before:
        assert time.monotonic() < deadline, "nothing was given back within 120 s"
        time.sleep(0.2)
    assert the_video(run_workflow(small(Sampler__seed=111))), "the next run loads again"


def test_the_object_info_is_complete(server: Comfy):
    """Every input has a tooltip or speaks for itself, and every node says what it does."""
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        info = {name: node for name, node in json.load(answer).items() if name.startswith("LiveAvatar_")}
    assert len(info) == 16
    for name, node in info.items():
        assert node["description"], name
        assert node["category"] == "Live Avatar"


def test_files_stay_inside_the_base(server: Comfy):
    assert Path(server.base / "models" / "liveavatar" / "demo").is_dir()
