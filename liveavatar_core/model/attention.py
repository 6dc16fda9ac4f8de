"""Dense attention, no mask: causality is a matter of which keys a cache returns."""

import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v for every head: (B, T, H, K)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
