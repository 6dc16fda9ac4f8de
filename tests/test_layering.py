"""Who may import whom, read off the source; and what importing the engine must not drag in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "liveavatar_core"

RANKS = [
    {"errors"},
    {"geometry"},
    {"config"},
    {"model", "sampling", "schedule", "io"},
    {"types", "encoders"},
    {"weights"},
    {"pipeline", "demo"},
    {"runtime"},
    {"bench", "client"},
    {"evaluate"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "server", "nodes", "folder_paths", "execution"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


CORE_FILES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_imports_only_downwards(path):
    own = path.relative_to(CORE).parts[0].removesuffix(".py")
    for module in imports(path):
        assert not module.startswith("."), f"{path.name} imports {module} relatively; workers need real names"
        top, _, rest = module.partition(".")
        assert top not in HOST, f"{path.name} imports the host's {module}"
        if top == "liveavatar_core" and rest:
            other = rest.split(".")[0]
            assert other == own or RANK[other] < RANK[own], f"{own} (rank {RANK[own]}) must not import {other}"


def test_the_plan_knows_no_torch():
    code = "import sys, liveavatar_core.pipeline.plan, liveavatar_core.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_stages_own_process_needs_no_diffusers():
    """Which takes longer to import than all else that it needs."""
    code = "import sys, liveavatar_core.runtime.cluster; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nodes_leave_the_model_alone():
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for module in imports(path):
            assert not module.startswith("liveavatar_core.model"), f"{path.name} reaches into {module}"


def test_what_is_optional_stays_in_its_files():
    """Ray and torch.distributed are imported where processes are meant, the host's HTTP library in the client."""
    homes = {
        "ray": {"cluster.py"},
        "torch.distributed": {"exchange.py", "process.py"},
        "aiohttp": {"connection.py"},
        "mediapipe": {"places.py"},
    }
    for path in CORE_FILES:
        for module in imports(path):
            for name, files in homes.items():
                inside = module == name or module.startswith(f"{name}.")
                assert not inside or path.name in files, f"{path.name} imports {module}"


def imported_at_once(path: Path) -> set[str]:
    """What importing this file imports before any of its functions is called."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_host_starts_without_waiting_for_libraries():
    """Importing the nodes imports, through the engine too, nothing that ComfyUI has not imported by then."""
    light = {"aiohttp", "numpy", "PIL", "psutil", "torch", *sys.stdlib_module_names}
    paths, seen = [*(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"], set()
    while paths:
        for module in imported_at_once(paths.pop()) - seen:
            seen.add(module)
            if module.startswith("liveavatar_core"):
                place = ROOT / module.replace(".", "/")
                paths += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
            else:
                assert module.split(".")[0] in light | HOST, f"{module} is imported when ComfyUI starts"


def test_no_side_doors():
    """No code is downloaded, built from text, or run in a shell."""
    for path in [*CORE_FILES, *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path.name} calls {node.func.id}"
        assert not imports(path) & {"subprocess", "urllib.request", "requests", "huggingface_hub"}, path.name
