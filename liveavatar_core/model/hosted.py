"""Layers whose weights live in host memory and visit the device for as long as they compute.

Each such layer, its audio injector included, is one image in host memory. The images take turns in two buffers on the
device: while one layer computes, the next one's image is copied. Parameters are views of a buffer, once and for all;
they mean something only during their layer's visit. Does not know which layers should be here, or what they compute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liveavatar_core.config import ModelConfig
from liveavatar_core.model.host_memory import Courier, HostMemory

ALIGNMENT = 512  # bytes; as the allocator of a GPU aligns, so that the same kernels are chosen


def layer_tensors(model: nn.Module, config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """Name -> tensor of all that only this layer needs."""
    prefixes = [f"blocks.{layer}."]
    if layer in config.audio_layers:
        injection = config.audio_layers.index(layer)
        prefixes += [f"audio_injector.{kind}.{injection}." for kind in ("injector", "injector_adain_layers")]
    return {
        prefix + name: tensor
        for prefix in prefixes
        for name, tensor in model.get_submodule(prefix[:-1]).state_dict().items()
    }


def image_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors.values())


class HostedLayers:
    """Of one model on one device. Layers must be visited in order, all of them, one round after the other."""

    def __init__(self, model: nn.Module, config: ModelConfig, layers: Sequence[int], device: torch.device) -> None:
        """`model`: on meta, its tensors in the dtypes they will have. Takes the memory; the weights follow one by one.

        Two layers or more, an even number of them: the last and the first are neighbours.
        """
        assert layers and len(layers) % 2 == 0, f"{len(layers)} layers cannot take turns in two buffers"
        self._turns = {layer: turn for turn, layer in enumerate(layers)}
        contents = [layer_tensors(model, config, layer) for layer in layers]
        sizes = [image_bytes(tensors) for tensors in contents]
        self._memory = HostMemory(device)
        self._images = [self._memory.empty((size,), torch.uint8) for size in sizes]
        self._buffers = [torch.empty(max(sizes[turn::2]), dtype=torch.uint8, device=device) for turn in (0, 1)]
        self._places: dict[str, tuple[Tensor, Tensor]] = {}  # name -> its part of the image, of the buffer
        for turn, tensors in enumerate(contents):
            start = 0
            for name, like in tensors.items():
                flat = slice(start, start + like.nbytes)
                image, buffer = self._images[turn][flat], self._buffers[turn % 2][flat]
                self._places[name] = tuple(x.view(like.dtype).view(like.shape) for x in (image, buffer))
                start += _aligned(like.nbytes)
        self._courier = Courier(device, "weights")

    @property
    def host_bytes(self) -> int:
        return self._memory.nbytes

    @property
    def device_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def store(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a parameter; returns what stands for it on the device."""
        image, buffer = self._places[name]
        image.copy_(tensor)
        return buffer

    def restart(self) -> None:
        """Bring the first layer, whatever was under way. To be called before the first round of a stream."""
        self._courier.send(0, self._bring)
        self._courier.join()

    def enter(self, layer: int) -> None:
        """A layer is about to compute; the one before it has."""
        turn = self._turns.get(layer)
        if turn is None:
            return
        self._courier.send(turn + 1, self._bring)
        if turn > 0:  # the first was brought, and waited for, in the round before
            self._courier.wait(turn)

    def leave(self) -> None:
        """The round is over."""
        self._courier.join()

    def _bring(self, turn: int) -> None:
        image = self._images[turn % len(self._images)]
        self._buffers[turn % 2][: image.nbytes].copy_(image, non_blocking=True)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
