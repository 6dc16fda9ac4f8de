"""Keys and values that outlive a forward: the attention sink, and the window of recent blocks.

Legend: B batch (1), T tokens of one block, S stored tokens, H heads, K head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from liveavatar_core.geometry import WINDOW_BLOCKS, Geometry
from liveavatar_core.model.layers import Values
from liveavatar_core.model.pointwise import FP8, Heads, dequantise_heads, quantise_heads, rotate

SCALE = torch.float32  # of a head in 8 bits


@dataclass(frozen=True, slots=True)
class SinkLayer:
    """One layer's attention sink as the prefill leaves it: keys not rotated, reference tokens first."""

    reference_k: Tensor  # (1, tokens_per_frame, H, K)
    motion_k: Tensor  # (1, motion_tokens, H, K)
    v: Tensor  # (1, sink_tokens, H, K)


def kinds(dtype: torch.dtype, attention: str, kv_cache: str) -> tuple[torch.dtype, torch.dtype]:
    """What keys and values are stored in, for settings as in RuntimeSpec and a model's `dtype`."""
    values = FP8 if kv_cache == "fp8" else dtype
    return torch.int8 if attention == "int8" else values, values


def token_bytes(heads: int, head_dim: int, dtype: torch.dtype, attention: str = "exact", kv_cache: str = "full") -> int:
    """Bytes that one token of one BlockCache takes, keys and values together."""
    return sum(
        heads * (head_dim * kind.itemsize + (0 if kind == dtype else SCALE.itemsize))
        for kind in kinds(dtype, attention, kv_cache)
    )


class BlockCache:
    """What the queries of one (step, layer) may see: attention sink and the last four blocks, in one buffer.

    The sink comes first, then a ring in which block b lives in slot b % 4, so that everything visible is always
    one prefix and attention needs no concatenation. Keys are stored rotated; their order does not matter.
    What is stored in 8 bits is quantised once, on its way in. Memory is taken once.
    """

    def __init__(
        self,
        geometry: Geometry,
        heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str = "exact",
        kv_cache: str = "full",
    ):
        self.sink_tokens, self.block_tokens = geometry.sink_tokens, geometry.tokens_per_block
        self._dtype = dtype
        shape = (1, self.sink_tokens + WINDOW_BLOCKS * self.block_tokens, heads, head_dim)

        def empty(kind: torch.dtype) -> Tensor | Heads:
            values = torch.empty(shape, device=device, dtype=kind)
            if kind == dtype:
                return values
            # Tokens side by side: a kernel reads the scales of many keys of one head.
            scale = torch.empty((1, heads, shape[1]), device=device, dtype=SCALE).transpose(1, 2)
            return Heads(values, scale)

        self.k_BSHK, self.v_BSHK = map(empty, kinds(dtype, attention, kv_cache))
        self.next_block = 0  # a Python int: never read back from a GPU
        self._reference_k: Tensor | None = None

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All that is stored: tensors (1, stored tokens, ...), the sink's tokens first."""
        return *_tensors(self.k_BSHK), *_tensors(self.v_BSHK)

    def place(self, memory: tuple[Tensor, ...]) -> None:
        """Live in other memory of the same shapes from now on; what is in it is taken as it is."""
        cut = len(_tensors(self.k_BSHK))
        self.k_BSHK, self.v_BSHK = (Heads(*part) if len(part) > 1 else part[0] for part in (memory[:cut], memory[cut:]))

    def install(self, sink: SinkLayer, motion: Tensor) -> None:
        """Take over a sink version; `motion` are the fixed rotary factors of its motion tokens."""
        self._reference_k = sink.reference_k
        _store(sink.motion_k, self.k_BSHK[:, sink.reference_k.shape[1] : self.sink_tokens], motion)
        _store(sink.v, self.v_BSHK[:, : self.sink_tokens])

    def roll(self, reference: Tensor) -> None:
        """Move the reference tokens to the position given by their rotary factors (rolling RoPE)."""
        _store(self._reference_k, self.k_BSHK[:, : self._reference_k.shape[1]], reference)

    def advance(self, block: int) -> None:
        """Blocks come in order, each once; to be called before a block's `update`."""
        if block != self.next_block:
            raise RuntimeError(f"cache expects block {self.next_block}, got {block}")
        self.next_block += 1

    def update(
        self, block: int, k_BTHK: Tensor, norm_D: Tensor, values: Values, factors: Tensor
    ) -> tuple[Tensor | Heads, Tensor]:
        """Store a block's keys, normed and rotated on the way, and values; return all that its queries may see.

        Views, or copies where 8 bits were given back the model's dtype. Keys stored as int8 stay so. `values(out)`
        computes the values, in the ring itself where they are stored as they are.
        """
        start = self.sink_tokens + block % WINDOW_BLOCKS * self.block_tokens
        slot = slice(start, start + self.block_tokens)
        _store(k_BTHK, self.k_BSHK[:, slot], factors, norm_D)
        v_BTHK = self.v_BSHK[:, slot]
        if isinstance(v_BTHK, Heads):
            _store(values(None), v_BTHK)
        else:
            values(v_BTHK)
        visible = self.sink_tokens + min(block + 1, WINDOW_BLOCKS) * self.block_tokens
        k_BSHK, v_BSHK = self.k_BSHK[:, :visible], self.v_BSHK[:, :visible]
        if isinstance(k_BSHK, Heads) and k_BSHK.values.dtype == FP8:
            k_BSHK = dequantise_heads(k_BSHK, self._dtype)
        if isinstance(v_BSHK, Heads):
            v_BSHK = dequantise_heads(v_BSHK, self._dtype)
        return k_BSHK, v_BSHK


def _tensors(part: Tensor | Heads) -> tuple[Tensor, ...]:
    return (part.values, part.scale) if isinstance(part, Heads) else (part,)


def _store(x_BTHK: Tensor, out: Tensor | Heads, factors: Tensor | None = None, norm_D: Tensor | None = None) -> None:
    if isinstance(out, Heads):
        quantise_heads(x_BTHK, factors, norm_D=norm_D, out=out)
    elif factors is None:
        out.copy_(x_BTHK)
    else:
        rotate(x_BTHK, factors, norm_D=norm_D, out=out)
