"""Into a ComfyUI that never had it, as people do: by git clone, and from the registry's zip."""

import json
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launch import ROOT
from launch.comfy import Comfy

NAME = "wan-live-avatar"


def git(folder: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(folder), *arguments, "-z"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git clone")
    folder = tmp_path_factory.mktemp("clone") / NAME
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def archive(clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip as the registry's tool makes it: what git tracks, less what .comfyignore names."""
    left_out = git(clone, "ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    path = tmp_path_factory.mktemp("zip") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in set(git(clone, "ls-files")) - set(left_out):
            packed.write(clone / name, name)
    return path


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / NAME
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return answer.read()


@pytest.mark.parametrize("way", ["clone", "unpacked"])
def test_it_works_where_it_is_put(way, server, artefacts, tmp_path, request) -> None:
    """`server` has the pack as it lies here; it lends its tree and says which nodes there must be.

    A library that nobody has is missing, which is said and keeps no node away.
    """
    pack = request.getfixturevalue(way)
    (pack / "requirements.txt").write_text("numpy\nno_such_library\n")
    there = {node for node in json.loads(get(f"{server.url}/object_info")) if node.startswith("LiveAvatar_")}
    templates = {path.stem for path in (pack / "workflows").glob("*.json")}
    log = artefacts / f"comfyui-{way}.log"
    with Comfy(server.tree, base=tmp_path / "comfyui", log=log, packs={NAME: pack}) as fresh:
        nodes = json.loads(get(f"{fresh.url}/object_info"))
        assert {node for node in nodes if node.startswith("LiveAvatar_")} == there
        assert set(json.loads(get(f"{fresh.url}/workflow_templates"))[NAME]) == templates
        for template in templates:
            address = f"{fresh.url}/api/workflow_templates/{NAME}/{template}"
            assert json.loads(get(f"{address}.json"))["nodes"]
            assert get(f"{address}.jpg").startswith(b"\xff\xd8")
            for node in json.loads((pack / "workflows" / "api" / f"{template}.json").read_text()).values():
                for kind in {"image", "audio"} & node["inputs"].keys() if node["class_type"].startswith("Load") else ():
                    assert (fresh.base / "input" / node["inputs"][kind]).is_file(), "the template lacks its input"
        scripts = [path for path in json.loads(get(f"{fresh.url}/extensions")) if f"/{NAME}/" in path]
        assert scripts and all(get(fresh.url + path) for path in scripts)
    said = log.read_text(errors="replace")
    assert not re.findall(r"^.*(?:ERROR|Traceback|FAILED|comfy_entrypoint).*$", said, re.MULTILINE)
    assert "Live Avatar: not installed are no_such_library, without which" in said


def test_the_zip_holds_what_is_needed(archive) -> None:
    names = set(zipfile.ZipFile(archive).namelist())
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"assets", "liveavatar_core", "locales", "models", "nodes", "subgraphs", "web", "workflows"}
    assert {name for name in names if "/" not in name} == {
        *("__init__.py", "LICENSE", "README.md", "pyproject.toml", "requirements.txt")
    }
    sizes = {entry.filename: entry.compress_size for entry in zipfile.ZipFile(archive).infolist()}
    model = sum(size for name, size in sizes.items() if name.startswith("models/"))
    assert model < 40_000_000 and sum(sizes.values()) - model < 3_000_000


def test_the_wheel_holds_the_engine(unpacked, tmp_path) -> None:
    shutil.copytree(unpacked, tmp_path / "pack")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(command, cwd=tmp_path / "pack", check=True)
    (wheel,) = tmp_path.glob("wan_live_avatar-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(unpacked).as_posix() for path in unpacked.glob("liveavatar_core/**/*.py")}


def test_the_host_reads_the_description(server) -> None:
    """By ComfyUI's own reader of pyproject.toml, and by the registry's rules for the pictures."""
    program = (
        f"import sys, json; sys.path.insert(0, {str(server.tree)!r})\n"
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        f"found = read({str(ROOT)!r}); print(json.dumps([found.project.model_dump(), found.tool_comfy.model_dump()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    project, comfy = json.loads(done.stdout)
    assert project["name"] == "wan-live-avatar" and "comfyui" not in comfy["display_name"].lower()
    assert project["supported_comfyui_version"] == ">=0.30.0"
    assert project["supported_os"] and project["supported_accelerators"]
    assert (ROOT / project["license"]["file"]).is_file()
    assert project["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    width, height = Image.open(ROOT / comfy["icon"]).size
    assert width == height <= 400
    width, height = Image.open(ROOT / "assets" / "banner.png").size
    assert width * 9 == height * 21


def test_pages_are_written_as_text() -> None:
    """No markup from strings, no code from strings: what a page shows may come from a file name or a model."""
    for path in [*(ROOT / "web").rglob("*.js"), *(ROOT / "web").rglob("*.mjs")]:
        for risky in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert risky not in path.read_text(encoding="utf-8"), f"{path.name}: {risky}"
