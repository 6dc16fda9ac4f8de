"""Loss and gradients of a batch, as one CUDA graph for every shape of it.

The models are small: a host cannot launch their thousands of kernels as fast as a GPU runs them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from training.run import Losses
from training.turns import alone

WARM_UPS = 3


class Gradients:
    """Call it with a batch's tensors: leaves gradients in the parameters and returns the losses.

    `losses` gets the same tensors and must be made of what is on the device: what it takes from the host, a number
    too, stays as it was at the first batch of that shape. On a CPU it just runs.
    """

    def __init__(self, model: nn.Module, losses: Callable[..., Losses]) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._losses = losses
        self._graphs: dict[Sequence[torch.Size], tuple] = {}
        self._pool = None  # memory of all graphs: they run one after the other
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *batch: Tensor) -> Losses:
        if not batch[0].is_cuda:
            return self._run(batch)
        shapes = tuple(x.shape for x in batch)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(batch)
        graph, inputs, values, gradients = self._graphs[shapes]
        for mine, given in zip(inputs, batch, strict=True):
            mine.copy_(given)
        graph.replay()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return {name: value.clone() for name, value in values.items()}  # the next replay overwrites them

    def _run(self, batch: Sequence[Tensor]) -> Losses:
        values = self._losses(*batch)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture(self, batch: Sequence[Tensor]) -> tuple:
        inputs = [x.clone() for x in batch]
        # one for all: where autograd adds to a parameter's gradient it waits for the stream of the first time
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(inputs)
                self._forget()  # so that the graph writes them and does not add
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with alone(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            values = self._run(inputs)
        self._pool = graph.pool()
        return graph, inputs, values, [p.grad for p in self._parameters]
