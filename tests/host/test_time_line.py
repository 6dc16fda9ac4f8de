"""Several stages in ComfyUI: the same video, and a picture of what each of them did."""

import numpy
import pytest
from test_hostile import small
from test_running import node_of, pictures, the_video

from liveavatar_core.client.connection import WorkflowFailed


def with_plan(workflow: dict, devices: str, plan: str) -> dict:
    workflow[node_of(workflow, "Sampler")]["inputs"]["runtime"] = ["runtime", 0]
    inputs = {"devices": devices, "plan": plan, "precision": "auto", "attention": "exact", "kv_cache": "full"}
    return workflow | {"runtime": {"class_type": "LiveAvatar_Runtime", "inputs": inputs | {"vram": 0.0}}}


def with_time_line(workflow: dict) -> dict:
    stream = workflow[node_of(workflow, "Decode")]["inputs"]["stream"]
    line = {"stream": stream, "after": [node_of(workflow, "Decode"), 0]}
    return workflow | {
        "line": {"class_type": "LiveAvatar_TimeLine", "inputs": line},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["line", 1]}},
    }


def test_stages_give_the_same_video_and_their_time_line(run_workflow):
    want = pictures(the_video(run_workflow(with_plan(small(Sampler__seed=130), "cpu", "single"))))
    run = run_workflow(with_time_line(with_plan(small(Sampler__seed=130), "cpu, cpu, cpu, cpu", "2x2")))
    assert numpy.array_equal(pictures(the_video(run)), want)
    (figures,) = run.outputs["show"]["text"]
    lines = figures.splitlines()
    assert lines[0].startswith("2 blocks") and [line.split(":")[0] for line in lines[1:]] == [
        f"stage {i}" for i in range(4)
    ]
    assert run.outputs["line"]["images"], "the picture is shown in the node"


def test_a_replay_has_no_time_line(run_workflow):
    workflow = small(Sampler__seed=131)
    run_workflow(workflow)
    again = with_time_line(small(Sampler__seed=131, Decode__filename_prefix="video/replayed"))
    with pytest.raises(WorkflowFailed, match="nothing has run that could be drawn"):
        run_workflow(again)
