"""What the runtime holds on a device, in the form ComfyUI counts memory in, so that it can ask for it back.

A real ModelPatcher around an empty module: the host's contract with patchers grows from version to version, and a
look-alike would break with it. All or nothing: the host may take everything while we are idle, and nothing meanwhile.
"""

import logging
from collections.abc import Callable

import comfy.model_patcher
import torch

log = logging.getLogger(__name__)


class LiveAvatarWeights(torch.nn.Module):
    """Empty; its name is what the host's log shows."""


class Footprint(comfy.model_patcher.ModelPatcher):
    def __init__(self, device: torch.device, release: Callable[[], bool]) -> None:
        """`release()` frees everything on all devices and returns True, or returns False while it is in use."""
        super().__init__(LiveAvatarWeights(), load_device=device, offload_device=torch.device("cpu"))
        self._release = release

    def is_dynamic(self) -> bool:
        return False

    def hold(self, nbytes: int) -> None:
        """So much is on the device now."""
        self.size = self.model.model_loaded_weight_memory = nbytes

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """The runtime loads the weights itself, right after the host has made room for them."""
        before, self.model.model_loaded_weight_memory = self.model.model_loaded_weight_memory, self.size
        self.model.device = device_to
        return self.size - before

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0

    def detach(self, unpatch_all=True):
        held = self.model.model_loaded_weight_memory
        if held and self._release():  # the host detaches dead patchers too, at the latest when Python ends
            log.info("Live Avatar gave back %.2f GiB on %s", held / 2**30, self.load_device)
            self.model.model_loaded_weight_memory = self.size = 0
        return self.model
