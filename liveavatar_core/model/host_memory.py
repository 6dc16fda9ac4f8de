"""Main memory beside a GPU, page-locked: copies run at the full speed of the bus, and beside the computing.

Knows bytes and streams, not what they are for. Beside a CPU the same is plain memory and plain copies.
"""

import mmap
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from liveavatar_core.errors import PlanError

GIB = 1024**3


class HostMemory:
    """Tensors in locked memory. Locking takes seconds, so memory is kept and, after `rewind`, given out once more to
    whoever asks for the same in the same order. It goes back to the system when this object dies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces: list[Tensor] = []  # bytes
        self._given = 0
        weakref.finalize(self, _unlock, self._pieces, device).atexit = False

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    def rewind(self) -> None:
        """Everything given out so far may be given out again."""
        self._given = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises PlanError when there is no more."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if self._given == len(self._pieces):
            try:
                self._pieces.append(_locked(nbytes, self._device))
            except (OSError, MemoryError) as error:
                raise PlanError(
                    f"main memory gives {self.nbytes / GIB:.1f} GiB to stream from and no more ({error}); close other "
                    "programs, or choose a smaller size, fp8 precision or an fp8 kv_cache"
                ) from error
        piece = self._pieces[self._given]
        assert piece.nbytes == nbytes, f"asked for {nbytes} bytes where {piece.nbytes} were given before"
        self._given += 1
        return piece.view(dtype).view(shape)


class Courier:
    """Copies on a stream of their own; nothing waits on the host."""

    def __init__(self, device: torch.device, name: str) -> None:
        """Couriers of one name share a stream."""
        self._device = device
        self._stream = _stream(device, name) if device.type == "cuda" else None
        self._done = tuple(torch.cuda.Event() for _ in range(2)) if self._stream else ()

    def send(self, n: int, copy: Callable[[int], None]) -> None:
        """Do copy(n) as soon as all is done that the current stream was given until now."""
        if self._stream is None:
            copy(n)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy(n)
        self._done[n % 2].record(self._stream)

    def wait(self, n: int) -> None:
        """Hold the current stream until copy n, one of the last two, is done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done[n % 2])

    def join(self) -> None:
        """Hold the current stream until every copy is done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@cache
def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    """The same ones for the life of the process: torch has 32, and then gives out those again that others work on."""
    return torch.cuda.Stream(device)


def _locked(nbytes: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.empty(nbytes, dtype=torch.uint8)
    # Pages of its own: torch's allocator for locked memory would round up to a power of two.
    piece = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    piece.zero_()  # by all cores; locking would have the pages made one by one
    with torch.cuda.device(device):
        error = torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), nbytes, 0)
    if int(error):
        with suppress(RuntimeError):  # the next call on the device would fail with the same error, once
            torch.zeros(1, device=device)
        raise MemoryError(f"the driver locks no further {nbytes / GIB:.1f} GiB: {error}")
    return piece


def _unlock(pieces: list[Tensor], device: torch.device) -> None:
    if device.type == "cuda" and pieces:
        torch.cuda.synchronize(device)  # copies may be under way
        for piece in pieces:
            torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
    pieces.clear()
