"""A server: files up, a workflow in API form run, its live video watched, results down."""

import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp

from liveavatar_core.client.workflow import Workflow
from liveavatar_core.errors import LiveAvatarError

OnEvent = Callable[[str, dict], None]
TO_EVERYONE = ("status", "liveavatar.stream")  # messages that name no run


class WorkflowFailed(LiveAvatarError):
    """ComfyUI refused the workflow, or a node of it failed; the message names the node."""


class ServerGone(LiveAvatarError):
    """No ComfyUI answers at the address, or it stopped answering."""


class Client:
    """async with Client("http://127.0.0.1:8188") as client: outputs = await client.run(workflow)

    Where the connection fails the block ends with ServerGone.
    """

    def __init__(self, url: str) -> None:
        self.url = url if "://" in url else f"http://{url}"
        self.id = uuid.uuid4().hex
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        # A video is watched for as long as it is made; only a server that is not there is waited for briefly.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=30)
        self._session = aiohttp.ClientSession(self.url, timeout=patience)
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._session.close()
        if isinstance(error, aiohttp.ClientError):
            raise ServerGone(f"no ComfyUI answers at {self.url} ({error or type(error).__name__})") from error

    async def takes_file(self, class_type: str, name: str) -> bool:
        """Whether this input of a node is a file of the server's input folder, as LoadImage's picture is."""
        async with self._session.get(f"/object_info/{class_type}") as answer:
            node = (await answer.json()).get(class_type, {}) if answer.status == 200 else {}
        for group in node.get("input", {}).values():
            for option, chosen in (group.get(name) or [None, {}])[1].items():
                if option.endswith("_upload") and chosen:
                    return True
        return False

    async def upload(self, path: Path) -> str:
        """Put a picture or a sound into the server's input folder; returns the name LoadImage and LoadAudio take.

        A file of the same name with other content stays; the new one is then called otherwise.
        """
        with path.open("rb") as file:
            form = aiohttp.FormData(quote_fields=False)  # ComfyUI takes names as they are, %20 too
            form.add_field("image", file, filename=path.name)
            answer = await self._post("/upload/image", data=form)
        return answer["name"]

    async def run(self, workflow: Workflow, on_event: OnEvent = lambda kind, data: None) -> dict[str, dict]:
        """Queue a workflow and wait for its end; returns what each output node reports, by node id.

        `on_event(kind, data)` sees ("queued", {"prompt_id": ...}) and then every message about this run, about the
        queue and about live videos, previews as ("preview", {"bytes": ...}).
        """
        # No limits: previews are large, and a long block sends nothing for minutes.
        async with self._session.ws_connect(f"/ws?clientId={self.id}", max_msg_size=0, heartbeat=None) as socket:
            # Must be the first message, or previews come without saying which node they belong to.
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            run = await self._queue(workflow)
            on_event("queued", {"prompt_id": run})
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
        raise ServerGone(f"ComfyUI at {self.url} closed the connection before the workflow ended")

    async def watch(self, stream: str) -> AsyncIterator[bytes]:
        """A live video from its beginning, piece by piece as it is made: fragmented mp4. `stream` is its id."""
        async for piece in self._pieces(f"/liveavatar/stream/{stream}.mp4"):
            yield piece

    async def download(self, file: dict) -> AsyncIterator[bytes]:
        """One result, named as the outputs name it: {"filename", "subfolder", "type"}."""
        async for piece in self._pieces("/view", {key: file[key] for key in ("filename", "subfolder", "type")}):
            yield piece

    async def fetch(self, file: dict) -> bytes:
        """As `download`, at once."""
        return b"".join([piece async for piece in self.download(file)])

    async def interrupt(self, run: str | None = None) -> None:
        """Stop a run, be it waiting or running; without its name, whatever runs now."""
        if run is not None:
            await self._command("/queue", {"delete": [run]})
        await self._command("/interrupt", {"prompt_id": run} if run else {})

    async def _queue(self, workflow: Workflow) -> str:
        answer = await self._post("/prompt", json={"prompt": workflow, "client_id": self.id})
        # A workflow with one valid and one invalid output is accepted, and only the valid part of it would run.
        if "prompt_id" not in answer or answer.get("node_errors"):
            if "prompt_id" in answer:
                await self.interrupt(answer["prompt_id"])
            raise WorkflowFailed(_explain(answer))
        return answer["prompt_id"]

    async def _post(self, path: str, **content: object) -> dict:
        async with self._session.post(path, **content) as answer:
            if answer.content_type != "application/json":
                raise WorkflowFailed(f"ComfyUI answered {answer.status} to {path}: {(await answer.text())[:200]}")
            return await answer.json()

    async def _command(self, path: str, content: dict) -> None:
        async with self._session.post(path, json=content) as answer:
            answer.raise_for_status()

    async def _pieces(self, path: str, query: dict[str, str] | None = None) -> AsyncIterator[bytes]:
        async with self._session.get(path, params=query) as answer:
            answer.raise_for_status()
            async for piece in answer.content.iter_any():
                yield piece


async def _messages(socket: aiohttp.ClientWebSocketResponse, run: str) -> AsyncIterator[tuple[str, dict]]:
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            yield "preview", {"bytes": message.data}
        elif message.type is aiohttp.WSMsgType.TEXT:
            content = json.loads(message.data)
            data = content.get("data") or {}
            if data.get("prompt_id") == run or content["type"] in TO_EVERYONE:
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
