"""Every workflow as a person meets it: opened in a real page, exported, run to the end; screenshots are kept."""

import json

import pytest

from launch import ROOT

WORKFLOWS = ROOT / "workflows"
SECONDS_PER_WORKFLOW = 600


PAGES = sorted(WORKFLOWS.glob("*.json"))


def without_titles(workflow: dict) -> dict:
    return {node_id: {key: node[key] for key in ("class_type", "inputs")} for node_id, node in workflow.items()}


def test_every_workflow_has_its_api_form() -> None:
    assert PAGES, "workflows/ holds no workflow"
    assert {path.name for path in PAGES} == {path.name for path in (WORKFLOWS / "api").glob("*.json")}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_workflow_opens_exports_and_runs(path, server, browse, artefacts) -> None:
    seen = browse("check_workflow.mjs", server.url, path, artefacts, SECONDS_PER_WORKFLOW)
    print(f"screenshots in {artefacts}")
    assert seen["missing"] == [], "the page does not know these node types"
    assert seen["marked"] == [], "the page marks these nodes as faulty"
    assert seen["dialog"] is None, "a dialog covers the workflow"
    shipped = json.loads((WORKFLOWS / "api" / path.name).read_text(encoding="utf-8"))
    assert without_titles(seen["api"]) == without_titles(shipped)
    assert seen["status"] == "success", seen["detail"]
    assert seen["problems"] == [], "the page reported errors"
