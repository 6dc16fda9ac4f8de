"""Several GPUs of one machine that learn one model: the same weights on all, other examples, gradients averaged.

    torchrun --nproc_per_node 4 -m training.dit.train ...

Without torchrun there is one process, and nothing here does anything.
"""

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


def place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join() -> str:
    """Meet the other processes, if there are any; returns this one's device."""
    number, count = place()
    on_gpu = torch.cuda.is_available()
    if count > 1:
        if on_gpu:
            torch.cuda.set_device(number)
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    return f"cuda:{number}" if on_gpu else "cpu"


def average_over_processes(values: Tensor) -> None:
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()


def largest(value: float) -> float:
    """Of all processes. Waits for them, and for the device."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
