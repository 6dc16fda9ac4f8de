"""The next step's batch is drawn while the GPU learns from this one's."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from training.turns import beside

Batch = Sequence[Tensor]


def ahead(draw: Callable[[int], Batch], device: torch.device | str) -> Callable[[int], Batch]:
    """step -> what `draw` gives for it, for steps in order. On a GPU a thread draws, on a stream of its own: what it
    copies there does not wait for what is learned."""
    if torch.device(device).type != "cuda":
        return draw
    stream, thread = torch.cuda.Stream(device), ThreadPoolExecutor(1, "ahead")
    drawn: dict[int, Future[Batch]] = {}

    def make(step: int) -> Batch:
        with beside(), torch.cuda.stream(stream):  # and its device
            made = draw(step)
            stream.synchronize()
        return made

    def batch(step: int) -> Batch:
        made = (drawn.pop(step, None) or thread.submit(make, step)).result()
        drawn[step + 1] = thread.submit(make, step + 1)
        for tensor in made:
            tensor.record_stream(torch.cuda.current_stream())
        return made

    return batch
