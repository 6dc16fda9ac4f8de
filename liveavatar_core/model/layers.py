"""The DiT layer and its parts. Attribute names are the checkpoint's, so that a state dict needs no translation.

Precision (SPEC 4.6): the residual stream enters and leaves a layer in the model's dtype and is float32 inside;
norms and modulation are float32. In a float32 model every cast below is the identity.

Legend: B batch (1), T tokens, S keys, D width, H heads, K head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveavatar_core.model.attention import attend
from liveavatar_core.model.pointwise import (
    EPS,
    Activation,
    Heads,
    add_norm,
    gated,
    gelu,
    norm,
    quantise_heads,
    rms_norm,
    rotate,
)

KeyValue = tuple[Tensor, Tensor]
Values = Callable[[Tensor | None], Tensor]
"""Projects this call's values, (1, T, H, K), into the memory given or new memory."""

See = Callable[[Tensor, Tensor, Values], tuple[Tensor | Heads, Tensor]]
"""Takes this call's keys as projected, the weight of their RMS norm and what gives the values; remembers them; returns
all keys (normed and rotated, maybe in int8) and values to see."""


def takes_rows(linear: nn.Module) -> bool:
    """Whether a linear wants its input quantised row by row, which whatever comes before it does in passing."""
    return getattr(linear, "takes_rows", False)


class Linear(nn.Linear):
    """A linear that can write its result where it belongs."""

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out); into `out`, contiguous, if given."""
        if out is None:
            return super().forward(x)
        torch.addmm(self.bias, x.flatten(0, -2), self.weight.t(), out=out.view(-1, self.out_features))
        return out


class RMSNorm(nn.Module):
    """RMS norm over the whole width, before it is split into heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Projections(nn.Module):
    """The four projections of an attention; queries and keys are normalised before they become heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.heads = heads

    def split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1))


class SelfAttention(Projections):
    def forward(self, x_BTD: Activation, factors: Tensor, see: See) -> Tensor:
        def values(out_BTHK: Tensor | None) -> Tensor:
            return self.split(self.v(x_BTD, None if out_BTHK is None else out_BTHK.flatten(2)))

        q, k = self.split(self.q(x_BTD)), self.split(self.k(x_BTD))
        k_BSHK, v_BSHK = see(k, self.norm_k.weight, values)
        rotated = quantise_heads if isinstance(k_BSHK, Heads) else rotate
        q_BTHK = rotated(q, factors, norm_D=self.norm_q.weight)
        return self.o(attend(q_BTHK, k_BSHK, v_BSHK).flatten(2))


class CrossAttention(Projections):
    """Keys and values come from outside: computed once per prompt (text) or per block (audio)."""

    def key_value(self, x_BSD: Tensor) -> KeyValue:
        return self.split(self.norm_k(self.k(x_BSD))), self.split(self.v(x_BSD))

    def forward(self, x_BTD: Activation, context: KeyValue) -> Tensor:
        q_BTHK = self.split(self.norm_q(self.q(x_BTD)))
        return self.o(attend(q_BTHK, *context).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x_BTD: Activation) -> Tensor:
        up, _, down = self
        return down(gelu(up(x_BTD), rows=takes_rows(down)))


class DiTLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(dim, heads)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossAttention(dim, heads)
        self.ffn = FeedForward(dim, ffn_dim)

    def forward(self, x_BTD: Tensor, time_6D: Tensor, factors: Tensor, text: KeyValue, see: See) -> Tensor:
        dtype = x_BTD.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[0].float() + time_6D).unbind(0)
        rows = takes_rows(self.self_attn.q)  # as the layer's other linears do
        h_BTD = norm(x_BTD, scale1, shift1, around_one=True, rounded=True, rows=rows)
        y_BTD = self.self_attn(h_BTD, factors, see)
        norm3 = self.norm3
        x_BTD, h_BTD = add_norm(x_BTD, y_BTD, gate1, norm3.weight, norm3.bias, dtype=dtype, rounded=True, rows=rows)
        y_BTD = self.cross_attn(h_BTD, text)
        x_BTD, h_BTD = add_norm(
            x_BTD, y_BTD, None, scale2, shift2, dtype=dtype, rounded=False, around_one=True, rows=rows
        )
        return gated(x_BTD, self.ffn(h_BTD), gate2, dtype)


class Head(nn.Module):
    """Tokens to velocity patches (1, 2, 2, channels), channel fastest; float32 inside."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))
        self.head = nn.Linear(dim, out_features)

    def forward(self, x_BTD: Tensor, time_D: Tensor) -> Tensor:
        shift, scale = (self.modulation[0].float() + time_D).unbind(0)
        h_BTD = norm(x_BTD, scale, shift, around_one=True, dtype=torch.float32)
        return F.linear(h_BTD, self.head.weight.float(), self.head.bias.float()).to(x_BTD.dtype)
