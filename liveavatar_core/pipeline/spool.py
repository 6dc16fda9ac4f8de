"""Finished latents on disk, to be decoded again without being made again. 0.4 MB a block at full size."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Spool:
    """One stream's latents, appended block by block. Losing it costs time, never a run: a full disk only ends it."""

    def __init__(self, path: Path, blocks: int) -> None:
        self.path, self._blocks = path, blocks
        self._written = 0
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32

    @property
    def complete(self) -> bool:
        return self._written == self._blocks and self.path.is_file()

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def write(self, block: int, latent: Tensor) -> None:
        """Blocks come in order; block 0 starts anew. A gap (after a failed write) keeps the spool incomplete."""
        if block not in (0, self._written):
            return
        latent = latent.cpu().contiguous()
        self._shape, self._dtype = tuple(latent.shape), latent.dtype
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("wb" if block == 0 else "ab") as file:
                file.write(latent.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            log.warning("latents cannot be kept for decoding again: %s", error)
            self.discard()
        else:
            self._written = block + 1

    def read(self) -> Iterator[tuple[int, Tensor]]:
        with self.path.open("rb") as file:
            size = self.path.stat().st_size // self._blocks
            for block in range(self._blocks):
                data = torch.frombuffer(bytearray(file.read(size)), dtype=self._dtype)
                yield block, data.view(self._shape)

    def discard(self) -> None:
        self._written = 0
        with contextlib.suppress(OSError):
            self.path.unlink()
