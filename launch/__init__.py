"""Getting and driving a real ComfyUI: for the demo, the tests, and anyone who wants to see the pack work.

Nothing in `nodes/` or `liveavatar_core/` imports this package.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class LaunchError(Exception):
    """Something the reader can act on: one sentence, shown without a traceback."""
