"""Dense attention, no mask: causality is a matter of which keys a cache returns."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.model.pointwise import Heads, dequantise_heads

log = logging.getLogger(__name__)

_HOPPER = (9, 0)  # from here on cuDNN's kernel is the fastest that comes with torch
_CLOSE = 1e-2  # relative L2 against float32; bfloat16 itself costs 2e-3


def attend(q_BTHK: Tensor | Heads, k_BSHK: Tensor | Heads, v_BSHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for every head: (B, T, H, K). Queries and keys are both exact, or both in int8."""
    if isinstance(q_BTHK, Heads):
        q_BTHK, k_BSHK = (dequantise_heads(x, v_BSHK.dtype) for x in (q_BTHK, k_BSHK))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    if _has_cudnn(q.device, q.dtype, q.shape[-1]):
        return _cudnn(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Named directly: which kernel torch prefers differs between its versions, and choosing by its context manager
    # would change the choice for every thread.
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]


@cache
def _has_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether cuDNN's attention runs here and agrees with a plain one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _HOPPER:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn((3, 1, 2, 256, head_dim), generator=generator, device=device)
    want = (q @ k.mT * head_dim**-0.5).softmax(-1) @ v
    try:
        got = _cudnn(q.to(dtype), k.to(dtype), v.to(dtype)).float()
    except RuntimeError as error:
        log.info("cuDNN attention is off on %s: %s", device, error)
        return False
    return ((got - want).norm() / want.norm()).item() < _CLOSE
