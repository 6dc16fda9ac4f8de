"""The block loop: requests in, latents out in order; and frames paired with the sound they belong to.

Both ends are lazy. Features are asked for when a block is admitted, frames are decoded when they are pulled, and no
more than `depth` blocks are in flight: an endless stream needs constant memory.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from liveavatar_core.config import SamplingConfig
from liveavatar_core.errors import Cancelled
from liveavatar_core.geometry import FRAMES_DROPPED, PRIME_LATENTS
from liveavatar_core.pipeline.hold import Hold
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.types import BlockRequest, Conditioning

POLL_SECONDS = 0.05  # how long a cancel may go unnoticed while a block is being made


class VideoDecoder(Protocol):
    """Frames come back with time first; a fresh decoder has seen nothing."""

    def prime(self, motion: Tensor) -> None: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Pipeline(Protocol):
    """The stages of one stream, wherever they are; a context manager, whose end stops them."""

    def __enter__(self) -> "Pipeline": ...

    def __exit__(self, *_: object) -> None: ...

    def prefill(self, version: int, reference: Tensor, motion: Tensor) -> None: ...

    def submit(self, request: BlockRequest) -> None: ...

    def result(self, timeout: float) -> tuple[int, Tensor] | None: ...


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Finished frames of one block."""

    block: int
    first_frame: int
    frames: Tensor  # (n, height, width, 3) uint8; n is 12, fewer in the first and the last block


def denoise(
    pipeline: Pipeline,
    conditioning: Conditioning,
    sampling: SamplingConfig,
    request: Callable[[int], BlockRequest],
    blocks: int,
    *,
    depth: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (block, latent (C, F, h, w)) for blocks 0..blocks-1.

    `request(block)` gives what a block needs. At `sampling.reanchor_block` the attention sink is replaced by one made
    from the first latent of block 0; blocks that need it are admitted before it exists and wait for it where they are,
    so the pipeline does not drain. Raises Cancelled when `should_stop()` turns true, StageError when a stage fails.
    """
    reanchor = sampling.reanchor_block
    pipeline.prefill(0, conditioning.reference, conditioning.motion)
    admitted = 0
    for block in range(blocks):
        while admitted < min(blocks, block + depth):
            pipeline.submit(_with_sink(request(admitted), reanchor))
            admitted += 1
        latent = _wait(pipeline, should_stop)
        if block == 0 and reanchor is not None and reanchor < blocks:
            pipeline.prefill(1, latent[:, :1], conditioning.motion)
        yield block, latent


def _with_sink(request: BlockRequest, reanchor: int | None) -> BlockRequest:
    sink = int(reanchor is not None and request.block >= reanchor)
    return BlockRequest(request.block, request.features, sink, request.noise, request.pose, request.mask)


def _wait(pipeline: Pipeline, should_stop: Callable[[], bool]) -> Tensor:
    while True:
        _check(should_stop)
        result = pipeline.result(POLL_SECONDS)
        if result is not None:
            return result[1]


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Cancelled("the stream was stopped; the blocks made so far are kept")


def held(
    latents: Iterable[tuple[int, Tensor]],
    hold: Hold,
    monitor: Monitor,
    blocks: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Tensor]]:
    """The same, of `blocks` blocks: while `hold` is paused none is pulled, though those in flight are finished; once it
    is stopped there are no more. Raises Cancelled when `should_stop()` turns true during a pause.
    """
    for block, latent in latents:
        yield block, latent
        if block + 1 < blocks and hold.paused:
            begin = time.perf_counter()
            while hold.paused:
                _check(should_stop)
                hold.wait(POLL_SECONDS)
            monitor.rested(begin, time.perf_counter())
        if hold.stopped:
            return


def frame_chunks(
    latents: Iterable[tuple[int, Tensor]], decoder: VideoDecoder, motion: Tensor, frames: int
) -> Iterator[FrameChunk]:
    """Decode blocks as they come, `frames` frames in all.

    The decoder is primed with still latents of the portrait, and the first three frames of block 0 are dropped: they
    belong to the time before the first audio frame is on screen.
    """
    decoder.prime(motion[:, :PRIME_LATENTS])
    first = 0
    for block, latent in latents:
        decoded = decoder.decode(latent)
        if block == 0:
            decoded = decoded[FRAMES_DROPPED:]
        decoded = decoded[: frames - first]
        yield FrameChunk(block, first, decoded)
        first += decoded.shape[0]
