"""A small client of ComfyUI's HTTP and websocket interface: upload, run a workflow in API form, fetch the results."""

import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp

from . import LaunchError

Workflow = dict[str, dict]
OnEvent = Callable[[str, dict], None]


class WorkflowFailed(LaunchError):
    """ComfyUI refused the workflow, or a node of it failed; the message names the node."""


class Client:
    """async with Client(server.url) as client: outputs = await client.run(workflow)"""

    def __init__(self, url: str) -> None:
        self.url = url
        self.id = uuid.uuid4().hex
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(self.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def upload(self, path: Path) -> str:
        """Put a picture or a sound into the server's input folder; returns the name LoadImage and LoadAudio take."""
        form = aiohttp.FormData({"overwrite": "true"})
        with path.open("rb") as file:
            form.add_field("image", file, filename=path.name)
            answer = await self._post("/upload/image", data=form)
        return answer["name"]

    async def run(self, workflow: Workflow, on_event: OnEvent = lambda kind, data: None) -> dict[str, dict]:
        """Queue a workflow and wait for its end; returns what each output node reports, by node id.

        `on_event(kind, data)` sees every message about this run, previews as ("preview", {"bytes": ...}).
        """
        # No limits: previews are large, and a long block sends nothing for minutes.
        async with self._session.ws_connect(f"/ws?clientId={self.id}", max_msg_size=0, heartbeat=None) as socket:
            # Must be the first message, or previews come without saying which node they belong to.
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            run = await self._queue(workflow)
            outputs: dict[str, dict] = {}
            async for kind, data in _messages(socket, run):
                on_event(kind, data)
                if kind == "executed":  # also sent for an output that comes from the cache
                    outputs[data["node"]] = data["output"] or {}
                if kind == "execution_success":  # /history learns of the end a moment later
                    return outputs
                if kind == "execution_error":
                    reason = data["exception_message"].strip()
                    raise WorkflowFailed(f"{data['node_type']} (node {data['node_id']}): {reason}")
                if kind == "execution_interrupted":
                    raise WorkflowFailed(f"interrupted at {data['node_type']} (node {data['node_id']})")
        raise WorkflowFailed("ComfyUI closed the connection before the workflow ended.")

    async def fetch(self, file: dict) -> bytes:
        """One result, named as the outputs name it: {"filename", "subfolder", "type"}."""
        wanted = {key: file[key] for key in ("filename", "subfolder", "type")}
        async with self._session.get("/view", params=wanted) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def interrupt(self) -> None:
        async with self._session.post("/interrupt") as answer:
            answer.raise_for_status()

    async def _queue(self, workflow: Workflow) -> str:
        answer = await self._post("/prompt", json={"prompt": workflow, "client_id": self.id})
        # A workflow with one valid and one invalid output is accepted, and only the valid part of it would run.
        if "prompt_id" not in answer or answer.get("node_errors"):
            if "prompt_id" in answer:
                await self._session.post("/queue", json={"delete": [answer["prompt_id"]]})
                await self._session.post("/interrupt", json={"prompt_id": answer["prompt_id"]})
            raise WorkflowFailed(_explain(answer))
        return answer["prompt_id"]

    async def _post(self, path: str, **content: object) -> dict:
        async with self._session.post(path, **content) as answer:
            if answer.status != 200 and answer.content_type != "application/json":
                raise LaunchError(f"ComfyUI answered {answer.status} to {path}: {(await answer.text())[:200]}")
            return await answer.json()


async def _messages(socket: aiohttp.ClientWebSocketResponse, run: str) -> AsyncIterator[tuple[str, dict]]:
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            yield "preview", {"bytes": message.data}
        elif message.type is aiohttp.WSMsgType.TEXT:
            content = json.loads(message.data)
            data = content.get("data") or {}
            if data.get("prompt_id") == run:
                yield content["type"], data


def _explain(refusal: dict) -> str:
    """ComfyUI's refusal as one line per node: which node, what is wrong."""
    lines = [
        f"{node['class_type']} (node {node_id}): {error['message']}: {error['details']}".removesuffix(": ")
        for node_id, node in refusal.get("node_errors", {}).items()
        for error in node["errors"]
    ]
    if not lines:
        error = refusal.get("error", {})
        lines = [error if isinstance(error, str) else f"{error.get('message')} {error.get('details')}"]
    return "ComfyUI refused the workflow. " + "\n".join(lines)
