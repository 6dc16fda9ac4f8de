"""Makes torchvision and torchaudio importable beside a CPU-only torch; run once by the new environment's python.

The package index carries only CUDA builds of the two for Linux, and ComfyUI cannot start without them. Their Python
code works with any torch of the matching version; it is their compiled parts that look for CUDA libraries. So those
are taken out of the way: torchaudio does without them if they are absent, torchvision needs two operator names to
exist before its own Python code registers shapes for them. Where both import as they are, nothing is touched.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

DECLARE_OPERATORS = '''"""Written by launch/cpu_torch.py: declares what torchvision's compiled part would declare."""
import sys


class DeclareOperators:
    """Asked once, when torchvision is first imported; importing torch any earlier would slow every start."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(cls)
        import torch

        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", signature)
        return None


sys.meta_path.insert(0, DeclareOperators)
'''


def imports(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def main() -> int:
    if not imports("torchaudio"):
        package = Path(importlib.util.find_spec("torchaudio").origin).parent
        shutil.rmtree(package / "lib", ignore_errors=True)
    if not imports("torchvision"):
        site_packages = Path(sysconfig.get_path("purelib"))
        (site_packages / "liveavatar_torchvision.py").write_text(DECLARE_OPERATORS)
        (site_packages / "liveavatar_torchvision.pth").write_text("import liveavatar_torchvision\n")
    return 0 if imports("torchaudio") and imports("torchvision") else 1


if __name__ == "__main__":
    sys.exit(main())
