"""Entry point for ComfyUI. Inert when anything else imports it: pytest imports this file as a bare module."""

import importlib.util
import sys
from pathlib import Path

WEB_DIRECTORY = "./web"


def _provide_core() -> None:
    """Make `import liveavatar_core` mean the copy beside this file, without touching sys.path.

    A path entry for this folder would also offer our `nodes/` as the top-level module `nodes`, which is the host's.
    """
    root = Path(__file__).parent / "liveavatar_core"
    spec = importlib.util.spec_from_file_location(
        "liveavatar_core", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["liveavatar_core"] = module
    spec.loader.exec_module(module)


if __package__:
    _provide_core()

    async def comfy_entrypoint():
        from .nodes import LiveAvatarExtension

        return LiveAvatarExtension()
