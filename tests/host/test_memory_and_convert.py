"""Planning memory and converting a model, from nodes."""

from pathlib import Path

import numpy
import pytest
from test_hostile import small
from test_running import node_of, pictures, the_video

from liveavatar_core.client.connection import WorkflowFailed

EXACT = {"attention": "exact", "kv_cache": "full", "vram": 0.0}


def with_runtime(workflow: dict, precision: str) -> dict:
    workflow[node_of(workflow, "Sampler")]["inputs"]["runtime"] = ["runtime", 0]
    settings = {"devices": "auto", "plan": "auto", "precision": precision}
    return workflow | {"runtime": {"class_type": "LiveAvatar_Runtime", "inputs": settings | EXACT}}


def convert_node(workflow: dict, filename: str) -> dict:
    model = workflow[node_of(workflow, "Sampler")]["inputs"]["model"]
    inputs = {"model": model, "filename": filename, "precision": "fp8"}
    return {"class_type": "LiveAvatar_ConvertAndSave", "inputs": inputs}


def test_a_converted_model_gives_the_same_video(server, run_workflow):
    workflow = with_runtime(small(Sampler__seed=120), "fp8")
    want = pictures(the_video(run_workflow(workflow)))
    workflow["convert"] = convert_node(workflow, "made/by_test")
    workflow[node_of(workflow, "Sampler")]["inputs"]["model"] = ["convert", 0]
    assert numpy.array_equal(pictures(the_video(run_workflow(workflow))), want)
    file = Path(server.base / "models" / "diffusion_models" / "made" / "by_test.safetensors")
    assert file.is_file() and [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("filename", ["../../escape", "/etc/escape", "", "a/../../b"])
def test_file_names_stay_below_the_models(run_workflow, filename):
    workflow = small(Sampler__seed=121)
    workflow["convert"] = convert_node(workflow, filename)
    with pytest.raises(WorkflowFailed, match="is not a name below"):
        run_workflow(workflow)


def test_the_memory_plan_is_shown(run_workflow):
    """For this machine, and for one with four cards that this is not."""
    workflow = small(Sampler__seed=122)
    model = workflow[node_of(workflow, "Sampler")]["inputs"]["model"]
    inputs = {"model": model, "size": "384*256", "steps": 4}
    plan = {"class_type": "LiveAvatar_MemoryPlan", "inputs": inputs}
    cards = {"devices": "cuda:0, cuda:1, cuda:2, cuda:3", "plan": "ring", "precision": "fp8"} | EXACT
    elsewhere = {"class_type": "LiveAvatar_MemoryPlan", "inputs": inputs | {"runtime": ["cards", 0]}}
    loader = {key: node for key, node in workflow.items() if key == model[0]}
    run = run_workflow(
        loader | {"here": plan, "there": elsewhere, "cards": {"class_type": "LiveAvatar_Runtime", "inputs": cards}}
    )
    told = b"".join(data["bytes"] for kind, data in run.events if "bytes" in data)
    texts = str([data for _, data in run.events]).replace("\\n", "\n") + told.decode("utf-8", "replace")
    assert "384x256, 4 steps, precision auto, plan single" in texts
    assert "384x256, 4 steps, precision fp8, plan ring" in texts and "cuda:3" in texts
