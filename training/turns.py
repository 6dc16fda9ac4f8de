"""Who may use the GPU: many threads beside each other, or one that captures a graph, alone.

While a graph is captured CUDA refuses whatever waits for the whole device, and freeing memory does, as cuDNN makes
PyTorch do after it has looked for the fastest way. The refusal also ends the capture.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_beside = 0
_captures = False


@contextmanager
def beside() -> Iterator[None]:
    """For a thread that works beside the one that learns. Waits for the end of a capture."""
    global _beside
    with _changed:
        _changed.wait_for(lambda: not _captures)
        _beside += 1
    try:
        yield
    finally:
        with _changed:
            _beside -= 1
            _changed.notify_all()


@contextmanager
def alone() -> Iterator[None]:
    """For the thread that captures: waits until the others have finished what they are at, and holds them up."""
    global _captures
    with _changed:
        _captures = True
        _changed.wait_for(lambda: not _beside)
    try:
        yield
    finally:
        with _changed:
            _captures = False
            _changed.notify_all()
