"""CUDA graphs of a stage's layers: the host launches once where it would launch some 1,500 kernels.

Owns the graphs, their common memory and their inputs. Does not know what the layers compute.
"""

import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Key = tuple[int, int]  # step, slot of the ring: what decides which memory a forward writes

_capturing = threading.Lock()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this device that is captured on and never run on.

    One for the process: the matrix library keeps 32 MiB of workspace for every stream it has ever seen.
    """
    return torch.cuda.Stream(device)


def can_capture(device: torch.device) -> bool:
    """Whether graphs can be made while other threads use the device.

    Not with cudaMallocAsync, which ComfyUI chooses by default: it takes what any thread allocates meanwhile for the
    graph's, and the process dies when that thread frees it.
    """
    return device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"


class LayerGraphs:
    """One graph per key. They run one after the other, so they share memory and inputs."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._inputs: tuple[Tensor, ...] = ()

    def run(self, key: Key, layers: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """layers(*inputs), captured at the first call of a key: its shapes must have run before, outside a graph.

        The result has the shape of the first input and lives until the next call.
        """
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        if key not in self._graphs:
            self._graphs[key] = self._capture(layers)
        self._graphs[key].replay()
        return self._inputs[0]

    def forget(self, step: int) -> None:
        """Drop a step's graphs: memory they read is about to be replaced."""
        old = [key for key in self._graphs if key[0] == step]
        if old:
            torch.cuda.current_stream().synchronize()  # they may still be running
        for key in old:
            del self._graphs[key]
        if not self._graphs:  # memory that no graph holds any more is closed to new ones
            self._pool = torch.cuda.graph_pool_handle()

    def _capture(self, layers: Callable[..., Tensor]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.stream(self._stream):  # stages that share a device share the stream
            # By hand, not by torch.cuda.graph: that one waits for the GPU first. Thread-local: other stages and the
            # decoder go on meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self._inputs[0].copy_(layers(*self._inputs))
            finally:
                graph.capture_end()
        return graph
