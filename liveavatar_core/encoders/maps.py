"""Feature maps of the decoder with channels last, (T, H, W, C): sums, norms, causal convolutions, upsampling.

Plain PyTorch says what is computed. On a GPU with Triton, what lies between two convolutions is one kernel, and so is a
convolution where the library's is known to be slow; where Triton is missing or fails, the plain form runs everywhere.
Legend: T frames, H rows, W columns, C channels in, N channels out.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

PAST = 2  # frames that a causal convolution sees beside each one


@dataclass(slots=True)
class Sum:
    """Maps on the way from one convolution to the next: x + bias + skip, added up by whoever takes them."""

    x_THWC: Tensor | None
    bias_C: Tensor | None = None
    skip_THWC: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x_THWC.shape

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, bias and skip, to be written over. Nothing stays here, so that no caller keeps alive what is done with."""
        parts = self.x_THWC, self.bias_C, self.skip_THWC
        self.x_THWC = self.bias_C = self.skip_THWC = None
        return parts


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels if they work on this device."""
    if device.type != "cuda":
        return None
    try:
        from liveavatar_core.encoders import kernels

        x = torch.ones(PAST, 1, 1, 16, device=device)
        kernels.gather(x, None, None, None, None, torch.empty_like(x), None)
    except Exception as error:  # no Triton, no compiler, an old card: the plain form needs none of them
        log.info("fused kernels of the decoder are off on %s: %s", device, error)
        return None
    return kernels


@cache
def _convolves(device: torch.device) -> bool:
    """Whether to use our own convolution: it beats the library's on Hopper, and was not tried elsewhere."""
    kernels = _kernels(device)
    if kernels is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    ones = torch.ones(3, 1, 2, 96, dtype=torch.bfloat16, device=device)
    ones[:, :, 1:] = 0
    out = ones.new_empty(1, 1, 1, 96)
    try:
        kernels.convolve(ones, ones.new_ones(96, 3, 3, 3, 96), None, out, 1, 1)
    except Exception as error:  # a Triton without tensor descriptors
        log.info("the decoder's own convolution is off on %s: %s", device, error)
        return False
    return bool((out == 3 * 96).all())  # three frames; all other taps lie beyond the edges


def _own(weight: Tensor, outputs: int) -> bool:
    """Whether a kernel (.., C, ...) with so many channels out is for our own convolution."""
    if weight.dtype not in (torch.bfloat16, torch.float16) or weight.shape[1] % 32 or not _convolves(weight.device):
        return False
    return _kernels(weight.device).widths(outputs) is not None


def add_up(x_THWC: Tensor, bias_C: Tensor | None, skip_THWC: Tensor | None) -> Tensor:
    """The sum of what there is, in the memory of x."""
    for part in (bias_C, skip_THWC):
        if part is not None:
            x_THWC += part
    return x_THWC


def norm_silu(x: Tensor, gamma_C: Tensor) -> Tensor:
    """SiLU of x (..., C) as vectors of length sqrt(C), times gamma."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.silu(F.normalize(wide, dim=-1) * (x.shape[-1] ** 0.5 * gamma_C.to(wide.dtype))).to(x.dtype)


def causal(
    maps: Sum, past: Tensor, weight: Tensor, gamma_C: Tensor | None = None, *, keep: bool = False
) -> tuple[Tensor | None, Tensor]:
    """(the sum if `keep`, its convolution with a kernel (N, C, 3, kh, kw)): (T, H, W, C) and (T, H, W, N).

    `past` (2, H, W, C) is what the convolution has seen of the frames before, and is left with what it has seen of the
    last. With `gamma_C` the sum is normed for it. Zeros beyond the edges.
    """
    own = _own(weight, len(weight))
    x, bias, skip = maps.take()
    total, seen = _gather(x, bias, skip, past, gamma_C, keep=keep, edge=int(own))
    rows, columns = (size // 2 for size in weight.shape[3:])
    if not own:
        del x, skip  # the convolution may have the memory
        return total, _convolve(seen, weight, (rows, columns))
    kernel, convolve = weight.permute(0, 2, 3, 4, 1).contiguous(), _kernels(weight.device).convolve
    if len(weight) == 3:
        # Too few channels to fill a product: the taps in time become channels, and are added up afterwards.
        y = x.new_empty((*seen.shape[:2], x.shape[2], 9), dtype=torch.float32)
        convolve(seen, kernel.transpose(0, 1).flatten(0, 1).unsqueeze(1).contiguous(), None, y, rows, columns)
        return total, (y[:-2, ..., :3] + y[1:-1, ..., 3:6] + y[2:, ..., 6:]).to(x.dtype)
    free = total is not x and len(weight) == x.shape[-1]
    out = x if free else x.new_empty((*x.shape[:3], len(weight)))
    convolve(seen, kernel, None, out, rows, columns)
    return total, out


def _convolve(x_THWC: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The library's convolution, (T - 2, H, W, N). Of narrow maps a CPU's over time takes ten times as long as three of
    pictures; picture by picture, so that wide ones stay in its cache."""
    x = x_THWC.permute(0, 3, 1, 2)
    if x.device.type == "cpu":
        frames = []
        for first in range(len(x) - PAST):
            before, *taps = (F.conv2d(x[first + t, None], weight[:, :, t], padding=padding) for t in range(PAST + 1))
            frames.append(before.add_(taps[0]).add_(taps[1]).permute(0, 2, 3, 1))
        return torch.cat(frames)
    y = F.conv3d(x.transpose(0, 1).unsqueeze(0), weight, padding=(0, *padding))[0].transpose(0, 1)
    return y.permute(0, 2, 3, 1).contiguous()


def _gather(
    x: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    past: Tensor | None,
    gamma_C: Tensor | None,
    *,
    keep: bool,
    edge: int,
) -> tuple[Tensor | None, Tensor]:
    """(the sum if `keep`, the past followed by the sum, normed if so): (T, H, W, C) and (T + 2, H, W + edge, C).

    The edge is zeros. `past` moves on. The sum lies in the memory of x or skip.
    """
    before = 0 if past is None else PAST
    frames, rows, columns, channels = x.shape
    seen = x.new_empty((before + frames, rows, columns + edge, channels))
    seen[:, :, columns:] = 0
    kernels = _kernels(x.device)
    if kernels and frames >= PAST and channels % 16 == 0:
        total = (x if skip is None else skip) if keep else None
        kernels.gather(x, bias, skip, gamma_C, total, seen, past)
        return total, seen
    total, inside = add_up(x, bias, skip), seen[:, :, :columns]
    for t in range(frames):
        inside[before + t] = total[t] if gamma_C is None else norm_silu(total[t], gamma_C)
    if past is not None:
        inside[:PAST] = past
        past.copy_(inside[-PAST:])
    return total if keep else None, seen


def twice(maps: Sum, past: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two frames of each, (2 T, H, W, N), by a kernel (2 N, C, 3, 1, 1): its first half makes the earlier."""
    half = len(weight) // 2
    if _own(weight, half):
        frames, rows, columns, _ = maps.shape
        _, seen = _gather(*maps.take(), past, None, keep=False, edge=1)
        out = seen.new_empty((2 * frames, rows, columns, half))
        for i, (part, part_bias) in enumerate(zip(weight.chunk(2), bias.chunk(2), strict=True)):
            _kernels(seen.device).convolve(seen, part.permute(0, 2, 3, 4, 1).contiguous(), part_bias, out[i::2], 0, 0)
        return out
    _, y = causal(maps, past, weight)
    return torch.stack((y + bias).chunk(2, -1), 1).flatten(0, 1)


def double(maps: Sum, weight: Tensor) -> Tensor:
    """Every pixel of the sum four times, then a kernel (N, C, 3, 3) -> (T, 2 H, 2 W, N)."""
    if _own(weight, len(weight)):
        frames, rows, columns, _ = maps.shape
        _, seen = _gather(*maps.take(), None, None, keep=False, edge=1)
        out = seen.new_empty((frames, 2 * rows, 2 * columns, len(weight)))
        for (down, right), quarter in _quarters(weight):
            _kernels(seen.device).convolve(seen, quarter, None, out[:, down::2, right::2], 1 - down, 1 - right)
        return out
    doubled = F.interpolate(add_up(*maps.take()).permute(0, 3, 1, 2), scale_factor=2, mode="nearest-exact")
    return F.conv2d(doubled, weight, padding=1).permute(0, 2, 3, 1).contiguous()


def _quarters(weight: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Of the four pixels made of one: which, and the kernel (N, 1, 2, 2, C) that makes it of the pixels there were."""
    kernels = (
        _halves(_halves(weight.float(), 2), 4).permute(0, 1, 2, 4, 5, 3).to(weight.dtype).unsqueeze(3).contiguous()
    )
    for right in (0, 1):
        for down in (0, 1):
            yield (down, right), kernels[right, down]


def _halves(kernel: Tensor, dim: int) -> Tensor:
    """Three taps on a doubled axis -> two on the axis as it was, for the first copy of a pixel and for the second: of
    three neighbours two are copies of one."""
    before, here, after = kernel.unbind(dim)
    return torch.stack((torch.stack((before, here + after), dim), torch.stack((before + here, after), dim)))
