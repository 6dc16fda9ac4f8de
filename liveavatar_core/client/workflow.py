"""Workflows in API form: read from a file, changed, and followed while they run. Needs no server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from liveavatar_core.errors import InputError

Workflow = dict[str, dict]
OURS = "LiveAvatar_"  # may be left off where a node is named


def read(path: Path) -> Workflow:
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no workflow that can be read ({error})") from error
    if not isinstance(workflow, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in workflow.values()
    ):
        raise InputError(f"{path} is not a workflow in API form; in ComfyUI's page: File, Export (API)")
    return workflow


def patch(workflow: Workflow, values: Mapping[tuple[str, str], object]) -> Workflow:
    """The workflow with inputs replaced, addressed by (class_type, input name) so that node ids may change."""
    patched = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in workflow.items()}
    for (node_name, name), value in values.items():
        for node_id in find(workflow, node_name):
            patched[node_id]["inputs"][name] = value
    return patched


def find(workflow: Workflow, name: str) -> list[str]:
    """The ids of the nodes of this class, or the one node of this id. Raises InputError where there is none."""
    if name in workflow:
        return [name]
    found = [node_id for node_id, node in workflow.items() if node["class_type"] in (name, OURS + name)]
    if not found:
        known = sorted({short(node["class_type"]) for node in workflow.values()})
        raise InputError(f"the workflow has no node {name}; it has {', '.join(known)}")
    return found


def short(class_type: str) -> str:
    return class_type.removeprefix(OURS)


def settings(workflow: Workflow, typed_in: Sequence[str]) -> Iterator[tuple[str, str, str, object]]:
    """(node id, input, text, the text as the input's value) of every NODE.INPUT=VALUE, for every node it names."""
    for setting in typed_in:
        address, equals, text = setting.partition("=")
        node, dot, name = address.partition(".")
        if not (equals and dot):
            raise InputError(f"--set {setting} is not NODE.INPUT=VALUE, as in LoadImage.image=face.png")
        for node_id in find(workflow, node):
            yield node_id, name, text, typed(workflow, node_id, name, text)


def typed(workflow: Workflow, node_id: str, name: str, text: str) -> object:
    """`text`, as typed in a terminal, in the type that the input has in the workflow."""
    node = workflow[node_id]
    address = f"{short(node['class_type'])}.{name}"
    if name not in node["inputs"]:
        raise InputError(f"there is no input {address}; the node has {', '.join(node['inputs'])}")
    known = node["inputs"][name]
    if isinstance(known, list | dict):
        raise InputError(f"{address} comes from another node and cannot be set")
    try:
        if isinstance(known, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(known, int | float):  # the page writes 2.0 as 2
            return int(text) if text.lstrip("-").isdecimal() else float(text)
        return text
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(known, bool) else "a number"
        raise InputError(f"{address} is {text!r}; it must be {kind}") from None


class Progress:
    """Which nodes have got further, from the messages of a run."""

    def __init__(self, workflow: Workflow) -> None:
        self._names = {node_id: short(node["class_type"]) for node_id, node in workflow.items()}
        self._seen: dict[str, float] = {}

    def news(self, kind: str, data: dict) -> list[str]:
        """As "Decode 3/42", for nodes of more than one step."""
        lines = []
        for node_id, state in data["nodes"].items() if kind == "progress_state" else ():
            value, total = state["value"], state["max"]
            if total > 1 and value > self._seen.get(node_id, 0):
                self._seen[node_id] = value
                lines.append(f"{self._names.get(node_id, node_id)} {value:g}/{total:g}")
        return lines
