"""Keys and values that outlive a forward: the attention sink, and the window of recent blocks.

Legend: B batch (1), T tokens of one block, S stored tokens, H heads, K head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from liveavatar_core.geometry import WINDOW_BLOCKS, Geometry
from liveavatar_core.model.pointwise import rotate


@dataclass(frozen=True, slots=True)
class SinkLayer:
    """One layer's attention sink as the prefill leaves it: keys not rotated, reference tokens first."""

    reference_k: Tensor  # (1, tokens_per_frame, H, K)
    motion_k: Tensor  # (1, motion_tokens, H, K)
    v: Tensor  # (1, sink_tokens, H, K)


class BlockCache:
    """What the queries of one (step, layer) may see: attention sink and the last four blocks, in one buffer.

    The sink comes first, then a ring in which block b lives in slot b % 4, so that everything visible is always
    one prefix and attention needs no concatenation. Keys are stored rotated; their order does not matter.
    Memory is taken once.
    """

    def __init__(self, geometry: Geometry, heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype):
        self.sink_tokens, self.block_tokens = geometry.sink_tokens, geometry.tokens_per_block
        shape = (1, self.sink_tokens + WINDOW_BLOCKS * self.block_tokens, heads, head_dim)
        self.k_BSHK = torch.zeros(shape, device=device, dtype=dtype)
        self.v_BSHK = torch.zeros(shape, device=device, dtype=dtype)
        self.next_block = 0  # a Python int: never read back from a GPU
        self._reference_k: Tensor | None = None

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """All that is stored: tensors (1, stored tokens, ...), the sink's tokens first."""
        return self.k_BSHK, self.v_BSHK

    def place(self, memory: tuple[Tensor, ...]) -> None:
        """Live in other memory of the same shapes from now on; what is in it is taken as it is."""
        self.k_BSHK, self.v_BSHK = memory

    def install(self, sink: SinkLayer, motion: Tensor) -> None:
        """Take over a sink version; `motion` are the fixed rotary factors of its motion tokens."""
        self._reference_k = sink.reference_k
        rotate(sink.motion_k, motion, out=self.k_BSHK[:, sink.reference_k.shape[1] : self.sink_tokens])
        self.v_BSHK[:, : self.sink_tokens] = sink.v

    def roll(self, reference: Tensor) -> None:
        """Move the reference tokens to the position given by their rotary factors (rolling RoPE)."""
        rotate(self._reference_k, reference, out=self.k_BSHK[:, : self._reference_k.shape[1]])

    def advance(self, block: int) -> None:
        """Blocks come in order, each once; to be called before a block's `update`."""
        if block != self.next_block:
            raise RuntimeError(f"cache expects block {self.next_block}, got {block}")
        self.next_block += 1

    def update(
        self, block: int, k_BTHK: Tensor, norm_D: Tensor, v_BTHK: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store a block's keys, normed and rotated on the way, and values; return views of all its queries may see."""
        start = self.sink_tokens + block % WINDOW_BLOCKS * self.block_tokens
        rotate(k_BTHK, factors, norm_D=norm_D, out=self.k_BSHK[:, start : start + self.block_tokens])
        self.v_BSHK[:, start : start + self.block_tokens] = v_BTHK
        visible = self.sink_tokens + min(block + 1, WINDOW_BLOCKS) * self.block_tokens
        return self.k_BSHK[:, :visible], self.v_BSHK[:, :visible]
