"""What a stage keeps in host memory: rings, which visit the device for the layer and step that read them, and sinks.

Does not know which rings should be here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveavatar_core.geometry import WINDOW_BLOCKS, Geometry
from liveavatar_core.model.cache import BlockCache, SinkLayer
from liveavatar_core.model.host_memory import Courier, HostMemory

VERSIONS = 2  # of the sink: one being shown, one made meanwhile

Key = tuple[int, int]  # step, layer


class HostedRings:
    """Rings of one stage. Two caches' worth of buffers take turns on the device: while one layer computes, the rows
    that the next ring shows are copied, but not the slot that is about to be written; once a layer has written its
    block, that goes back. The sink's rows are no part of a ring: whoever uses the cache installs them.

    A visit has a number: rings in the order in which a block meets them, blocks one after another. Of its three calls
    `expect` comes as soon as the layer before is done, `arrive` before the cache is used, `leave` after it was written.
    """

    def __init__(self, caches: Mapping[Key, BlockCache], host: HostMemory, device: torch.device) -> None:
        """`caches`, on meta, in the order in which a block meets them; two or more, since each waits for the last."""
        assert len(caches) > 1, "one ring cannot wait for its own rows"
        self._caches = dict(caches)
        self._numbers = {key: number for number, key in enumerate(caches)}
        like = next(iter(caches.values()))
        self._sink, self._block = like.sink_tokens, like.block_tokens
        ring = [((1, x.shape[1] - self._sink, *x.shape[2:]), x.dtype) for x in like.memory]
        self._rings = [tuple(host.empty(*shape_dtype) for shape_dtype in ring) for _ in caches]
        self._buffers = [tuple(torch.empty_like(x, device=device) for x in like.memory) for _ in range(2)]
        self._down, self._up = Courier(device, "rings down"), Courier(device, "rings up")
        self._here = -1  # the visit whose rows are in their buffer, or will be after what was launched
        self._first = -1  # of the step

    def __contains__(self, key: Key) -> bool:
        return key in self._caches

    def begin(self, step: int, block: int) -> None:
        """Before a step. Where blocks overtake each other it may be another than was expected: its rows come now."""
        visits = [self._visit(key, block) for key in self._caches if key[0] == step]
        if not visits:
            return
        if self._here != visits[0]:
            self._down.send(visits[0], self._bring)
            self._down.join()
        self._first, self._here = visits[0], visits[-1] + 1

    def expect(self, key: Key, block: int) -> None:
        visit = self._visit(key, block)
        if visit != self._first:
            self._up.join()  # the buffer that is filled next has been read
        self._down.send(visit + 1, self._bring)

    def arrive(self, key: Key, block: int) -> None:
        visit = self._visit(key, block)
        if visit != self._first:  # which was waited for before the step
            self._down.wait(visit)
        self._caches[key].place(self._buffers[visit % 2])

    def leave(self, key: Key, block: int) -> None:
        self._up.send(self._visit(key, block), self._send_back)

    def end(self, step: int) -> None:
        """After a step."""
        if any(key[0] == step for key in self._caches):
            self.join()

    def join(self) -> None:
        """Whatever is being copied comes before what the caller does next."""
        self._down.join()
        self._up.join()

    def _visit(self, key: Key, block: int) -> int:
        return block * len(self._rings) + self._numbers[key]

    def _bring(self, visit: int) -> None:
        block, number = divmod(visit, len(self._rings))
        slot, filled = block % WINDOW_BLOCKS, min(block, WINDOW_BLOCKS)
        for first, last in ((0, min(slot, filled)), (slot + 1, filled)):
            if first < last:
                rows = slice(first * self._block, last * self._block)
                for there, here in zip(self._rings[number], self._buffers[visit % 2], strict=True):
                    self._on_device(here, rows).copy_(there[0, rows], non_blocking=True)

    def _send_back(self, visit: int) -> None:
        block, number = divmod(visit, len(self._rings))
        slot = block % WINDOW_BLOCKS
        rows = slice(slot * self._block, (slot + 1) * self._block)
        for there, here in zip(self._rings[number], self._buffers[visit % 2], strict=True):
            there[0, rows].copy_(self._on_device(here, rows), non_blocking=True)

    def _on_device(self, buffer: Tensor, rows: slice) -> Tensor:
        return buffer[0, self._sink + rows.start : self._sink + rows.stop]


class HostedSinks:
    """The sink's versions of one stage, as their prefills leave them; one of them is on the device, always in the same
    memory."""

    def __init__(
        self,
        layers: range,
        geometry: Geometry,
        heads: int,
        head_dim: int,
        *,
        host: HostMemory,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape, frame = (1, geometry.sink_tokens, heads, head_dim), geometry.tokens_per_frame
        self._kept = [  # version -> layer -> keys, values
            {layer: tuple(host.empty(shape, dtype) for _ in range(2)) for layer in layers} for _ in range(VERSIONS)
        ]
        self._here = {
            layer: tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)) for layer in layers
        }
        self._version = -1
        self.shown = {layer: SinkLayer(k[:, :frame], k[:, frame:], v) for layer, (k, v) in self._here.items()}

    def keep(self, version: int, layer: int, k_BSHK: Tensor, v_BSHK: Tensor) -> None:
        for kept, x in zip(self._kept[version % VERSIONS][layer], (k_BSHK, v_BSHK), strict=True):
            kept.copy_(x, non_blocking=True)

    def show(self, version: int) -> bool:
        """Whether another one was `shown` until now."""
        changed, self._version = self._version != version, version
        if changed:
            for layer, kept in self._kept[version % VERSIONS].items():
                for here, x in zip(self._here[layer], kept, strict=True):
                    here.copy_(x, non_blocking=True)
        return changed
