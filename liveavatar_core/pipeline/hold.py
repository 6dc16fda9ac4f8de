"""A person's hold on a running stream: pause it, let it go on, end it. Any thread may; it obeys between two blocks."""

import threading


class Hold:
    def __init__(self) -> None:
        self.stopped = False
        self._released = threading.Event()
        self._released.set()

    @property
    def paused(self) -> bool:
        return not self._released.is_set()

    def pause(self) -> None:
        if not self.stopped:
            self._released.clear()

    def resume(self) -> None:
        self._released.set()

    def stop(self) -> None:
        """What has been made is all there will be."""
        self.stopped = True
        self._released.set()

    def wait(self, timeout: float) -> None:
        """Until nothing is paused any more, at most `timeout` seconds."""
        self._released.wait(timeout)
