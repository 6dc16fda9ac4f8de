"""Which demo model is used."""

from pathlib import Path

from liveavatar_core.demo.files import SHIPPED, DemoFiles
from liveavatar_core.demo.random_model import write_demo


def demo_files(cache: Path, shipped: Path = SHIPPED) -> DemoFiles:
    """The trained model if there is one, else the random one, which is written to `cache` or is there already."""
    trained = DemoFiles(shipped)
    if not trained.exists:
        return write_demo(cache)
    trained.check()
    return trained
