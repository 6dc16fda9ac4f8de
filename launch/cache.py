"""The one folder outside the clone that this project writes to, and the lock that guards what is built in it."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """`LIVEAVATAR_CACHE`, else `wan-live-avatar` where the platform keeps caches."""
    chosen = os.environ.get("LIVEAVATAR_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wan-live-avatar"


@contextlib.contextmanager
def locked(path: Path, while_waiting: str) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when the holder dies, however it dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not _try_lock(file):
            print(while_waiting, flush=True)
            while not _try_lock(file):
                time.sleep(0.5)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
