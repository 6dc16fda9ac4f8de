"""The benchmark node: a table of the demo model's figures, and an end when somebody wants one."""

import asyncio

import pytest
from test_hostile import small
from test_running import node_of

from liveavatar_core.client.connection import Client, WorkflowFailed


def benchmark(**inputs: object) -> dict:
    """The demo's workflow with a benchmark in place of the sampler and all after it."""
    workflow = small()
    demo = node_of(workflow, "DemoLoader")
    sockets = {name: [demo, place] for name, place in (("model", 0), ("vae", 2), ("audio_encoder", 3))}
    sockets["image"] = [node_of(workflow, "ImageLoader"), 0]
    for name in ("Sampler", "Decode", "AudioEncoder", "PromptConditioner"):
        del workflow[node_of(workflow, name)]
    settings = {"size": "384*256", "steps": 2, "blocks": 13, **inputs}
    return workflow | {"bench": {"class_type": "LiveAvatar_Benchmark", "inputs": sockets | settings}}


def texts(events: list[tuple[str, dict]]) -> str:
    return b"".join(data["bytes"] for _, data in events if "bytes" in data).decode("utf-8", "replace")


def test_interrupt_ends_it(server):
    async def run() -> None:
        async with Client(server.url) as client, Client(server.url) as other:

            def watch(kind: str, data: dict) -> None:
                if b"filling the window" in data.get("bytes", b""):
                    asyncio.get_running_loop().create_task(other.interrupt())

            await client.run(benchmark(blocks=10_000), watch)

    with pytest.raises(WorkflowFailed, match="interrupted at LiveAvatar_Benchmark"):
        asyncio.run(asyncio.wait_for(run(), 300))


def test_the_table_is_shown(run_workflow):
    """Also after a benchmark that was stopped."""
    run = run_workflow(benchmark())
    assert "timing the stream: block 13 of 13" in texts(run.events)
    (table,) = run.outputs["bench"]["text"]
    for row in ("forward, one step of one block ms", "frames a second, decoder included", "This card at its best"):
        assert row in table
