"""Every workflow as a person meets it: opened in a real page, exported, run to the end, in two languages; and the
blueprint, placed in a graph. Screenshots are kept.
"""

import json
import re
import urllib.request

import pytest

from launch import ROOT

WORKFLOWS, BLUEPRINT = ROOT / "workflows", ROOT / "subgraphs" / "Live Avatar.json"
SECONDS_PER_WORKFLOW = 600
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
CHINESE = re.compile("[\u4e00-\u9fff]")


def without_titles(workflow: dict) -> dict:
    return {node_id: {key: node[key] for key in ("class_type", "inputs")} for node_id, node in workflow.items()}


def overlapping(boxes: list) -> list[tuple[str, str]]:
    """Pairs of nodes that cover each other; a node's title stands above its place."""
    spans = [(title, x, y - 30, x + width, y + height) for title, x, y, width, height in boxes]
    return [
        (a[0], b[0])
        for i, a in enumerate(spans)
        for b in spans[:i]
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]


@pytest.fixture(scope="module")
def seen(server, browse, artefacts) -> dict:
    return browse("open_workflows.mjs", server.url, WORKFLOWS, BLUEPRINT, artefacts, SECONDS_PER_WORKFLOW)


def test_every_workflow_has_its_api_form_and_its_picture() -> None:
    assert NAMES, "workflows/ holds no workflow"
    assert NAMES == sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    assert NAMES == sorted(path.stem for path in WORKFLOWS.glob("*.jpg"))


@pytest.mark.parametrize("name", [*NAMES, "blueprint"])
def test_it_opens_and_runs(name, seen) -> None:
    page = seen[name]
    assert page["missing"] == [], "the page does not know these node types"
    assert page["marked"] == [], "the page marks these nodes as faulty"
    assert page["dialog"] is None, "a dialog covers the workflow"
    assert overlapping(page["boxes"]) == []
    assert page["status"] == "success", page["detail"]
    assert page["problems"] == [], "the page reported errors"


@pytest.mark.parametrize("name", NAMES)
def test_what_it_exports_is_what_is_shipped(name, seen) -> None:
    shipped = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert without_titles(seen[name]["api"]) == without_titles(shipped)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_chinese(name, seen) -> None:
    page = seen[name]["chinese"]
    assert page["missing"] == page["marked"] == page["problems"] == [] and page["dialog"] is None
    assert page["titles"] and all(CHINESE.search(title) for title in page["titles"]), page["titles"]
    assert overlapping(page["boxes"]) == []
    assert without_titles(page["api"]) == without_titles(seen[name]["api"])


def test_the_host_offers_the_blueprint(server) -> None:
    with urllib.request.urlopen(f"{server.url}/global_subgraphs") as answer:
        offered = [key for key, entry in json.load(answer).items() if entry["name"] == BLUEPRINT.stem]
    assert len(offered) == 1
    with urllib.request.urlopen(f"{server.url}/global_subgraphs/{offered[0]}") as answer:
        assert json.loads(json.load(answer)["data"]) == json.loads(BLUEPRINT.read_text(encoding="utf-8"))
