"""Runs a ComfyUI tree in this process and ends it when standard input closes.

    python serve.py TREE [ComfyUI's own arguments]

The pipe on standard input is held by whoever started the server. It closes when they ask the server to stop and also
when they die, on every platform and however they die, so that no server is ever left behind.
"""

import contextlib
import os
import runpy
import signal
import sys
import threading
import time

SECONDS_TO_CLOSE = 10


def stop_when_input_closes() -> None:
    # os.read, not sys.stdin: the latter's lock would be held while the interpreter shuts down.
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if os.name == "nt":
        signal.raise_signal(signal.SIGINT)
    else:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(SECONDS_TO_CLOSE)
    os._exit(1)


if __name__ == "__main__":
    tree, *arguments = sys.argv[1:]
    # A process started in the background of a shell script inherits "ignore"; ComfyUI expects the exception.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop_when_input_closes, name="stop when input closes", daemon=True).start()
    os.chdir(tree)
    sys.path[0] = tree
    sys.argv = ["main.py", *arguments]
    runpy.run_path(os.path.join(tree, "main.py"), run_name="__main__")
