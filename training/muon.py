"""Muon: momentum whose singular values are made equal before it is a step, so that a matrix learns in all directions
at once. Jordan et al. 2024, kellerjordan.github.io/posts/muon; step sizes as arXiv 2502.16982.

torch.optim.Muon takes matrices only, one after the other; here are convolutions, and hundreds of small matrices that a
GPU would wait for.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SMALLEST = 16  # of a matrix's sides
ITERATIONS, A, B, C = 5, 3.4445, -4.7750, 2.0315  # Newton-Schulz: singular values come to 0.7 to 1.2
AS_ADAMW = 0.2  # root mean square of a step of AdamW, of a rate


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: weights that learn and map vectors to vectors, neither of them short; not tables."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd))
    weights = [w for layer in layers for w in layer.parameters(recurse=False) if w.dim() > 1 and w.requires_grad]
    return [w for w in weights if min(w.flatten(1).shape) >= SMALLEST]


class Muon(torch.optim.Optimizer):
    """For weights (out, in, ...). A rate means what it means to AdamW."""

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            means = [self.state[weight].setdefault("mean", torch.zeros_like(weight)) for weight in weights]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # as Nesterov
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight, gradient in zip(weights, ahead, strict=True):
                alike[gradient.flatten(1).shape].append((weight, gradient.flatten(1)))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for shape, pairs in alike.items():
                steps = orthogonal(torch.stack([gradient for _, gradient in pairs]))
                changes = [step.view(weight.shape) for (weight, _), step in zip(pairs, steps, strict=True)]
                length = group["lr"] * AS_ADAMW * max(shape) ** 0.5
                torch._foreach_add_([weight for weight, _ in pairs], changes, alpha=-length)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """The same singular vectors with singular values near 1; (N, R, C)."""
    x = matrices_NRC
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        x = A * x + (B * squares + C * squares @ squares) @ x
    return x.mT if tall else x
