"""Dense attention, no mask: causality is a matter of which keys a cache returns.

Which kernel does it is found out once per device, dtype and head width: of those known, quickest first, the first one
that runs there and agrees with attention written out in float32.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from liveavatar_core.model.pointwise import Heads, dequantise_heads, quantise_heads

log = logging.getLogger(__name__)

_HOPPER = (9, 0)  # from here on there are kernels that are quicker than torch's own choice
_CLOSE = 1e-2  # relative L2 against float32; bfloat16 itself costs 2e-3

Kernel = Callable[..., Tensor]  # queries (B, T, H, K), keys and values (B, S, H, K) -> (B, T, H, K)


def attend(q_BTHK: Tensor | Heads, k_BSHK: Tensor | Heads, v_BSHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for every head: (B, T, H, K). Queries and keys are both exact or both in int8."""
    kernel = _int8_kernel if isinstance(q_BTHK, Heads) else _exact_kernel
    batch, _, _, width = v_BSHK.shape
    return kernel(v_BSHK.device, v_BSHK.dtype, batch, width)(q_BTHK, k_BSHK, v_BSHK)


@cache
def _exact_kernel(device: torch.device, dtype: torch.dtype, batch: int, width: int) -> Kernel:
    if not _has_kernels(device, dtype) or torch.cuda.get_device_capability(device) < _HOPPER:
        return _torch
    known = {"FlashAttention 4": _flash4, "FlashAttention 3": _flash3, "cuDNN": lambda: _cudnn}
    return _first(known, _samples(device, dtype, batch, width)) or _torch


@cache
def _int8_kernel(device: torch.device, dtype: torch.dtype, batch: int, width: int) -> Kernel:
    if not _has_kernels(device, dtype):
        return _plain_int8
    hopper = torch.version.cuda and torch.cuda.get_device_capability(device) == _HOPPER
    # On Hopper the one in Triton is slower than an exact one (H100: 2.35 and 1.7 ms).
    known = {"int8 in Gluon": _gluon} if hopper else {"int8 in Triton": _triton}
    q, k, v = _samples(device, dtype, batch, width, heads=70)  # more tiles than there are multiprocessors
    return _first(known, (quantise_heads(q), quantise_heads(k), v)) or _plain_int8


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _samples(device: torch.device, dtype: torch.dtype, batch: int, width: int, heads: int = 2) -> tuple[Tensor, ...]:
    """Queries, keys and values, odd numbers of them."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((batch, tokens, heads, width) for tokens in (130, 700, 700))
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)


def _first(known: dict[str, Callable[[], Kernel]], samples: tuple) -> Kernel | None:
    """The first kernel that is there and right."""
    q, k, v = (dequantise_heads(x, torch.float32) if isinstance(x, Heads) else x.float() for x in samples)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
    for name, load in known.items():
        try:
            kernel = load()
            error = ((kernel(*samples).float() - want).norm() / want.norm()).item()
        except ImportError:
            continue
        except Exception as problem:  # whatever a compiler, a driver or somebody's package has to say
            log.info("attention: %s is off on %s: %s", name, v.device, problem)
            continue
        if error < _CLOSE:
            log.info("attention: %s on %s", name, v.device)
            return kernel
        log.warning("attention: %s is wrong on %s, by %.0e", name, v.device, error)
    return None


def _torch(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    # Named directly: which kernel torch prefers differs between its versions, and choosing by its context manager
    # would change the choice for every thread.
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].transpose(1, 2)


def _flash4() -> Kernel:
    from flash_attn.cute import flash_attn_func

    return lambda *heads: _result(flash_attn_func(*heads))


def _flash3() -> Kernel:
    from flash_attn_interface import flash_attn_func

    return lambda *heads: _result(flash_attn_func(*heads))


def _result(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return the softmax's sums too."""
    return given if isinstance(given, Tensor) else given[0]


def _gluon() -> Kernel:
    from liveavatar_core.model import attention_hopper

    return attention_hopper.attend


def _triton() -> Kernel:
    from liveavatar_core.model import attention_triton

    return attention_triton.attend


def _plain_int8(q: Heads, k: Heads, v_BSHK: Tensor) -> Tensor:
    """As exact attention of what the 8 bits stand for."""
    return attend(dequantise_heads(q, v_BSHK.dtype), dequantise_heads(k, v_BSHK.dtype), v_BSHK)
