"""Threads that stages run in, the same ones from stream to stream.

cuDNN's plans are made and kept per thread: a new thread made them anew for 0.3 s before a stream's first frames.
"""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_idle: defaultdict[int, list[ThreadPoolExecutor]] = defaultdict(list)  # by stage


def start(stage: int, work: Callable[[], None]) -> Future:
    """Run `work` in an idle thread that ran this stage before, or in a new one; one that hangs is never idle."""
    try:
        thread = _idle[stage].pop()
    except IndexError:
        thread = ThreadPoolExecutor(1, f"liveavatar-stage-{stage}")

    def run() -> None:
        try:
            work()
        finally:
            _idle[stage].append(thread)

    return thread.submit(run)
