"""Three-axis rotary embedding, computed at any position and on any device. Knows positions, not caches.

Head channels are taken as adjacent pairs (2i, 2i+1); the first pairs carry time, then height, then width.
Factors are tables `(T, K/2, 2)` of (cos, sin) per token. Source: SPEC 4.4.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from liveavatar_core.geometry import LATENTS_PER_BLOCK, Geometry

THETA = 10_000.0
REFERENCE_POSITION = 30  # time position of the reference picture in the prefill; it never moves before this
MOTION_TIMES = ((-1,), (-3,), (-19, -14, -9, -4))  # newest latent, two before it, sixteen before those


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head given to time, height and width."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _axis(positions: Sequence[int], width: int, rounding: bool, device: torch.device | str) -> Tensor:
    """(n, width/2, 2) cos and sin. Angles in float64: positions grow without bound."""
    frequencies = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    if isinstance(positions, range):  # made where they are needed: a copy would wait for all work before it
        places = torch.arange(positions.start, positions.stop, dtype=torch.float64, device=device)
    else:
        places = torch.as_tensor(positions, dtype=torch.float64, device=device)
    angles = torch.outer(places, frequencies)
    factors = torch.stack((angles.cos(), angles.sin()), -1)
    # The model was trained with factors that had passed through a half-precision table.
    return (factors.half() if rounding else factors).float()


def grid_factors(
    times: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
    head_dim: int,
    rounding: bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(len(times) * len(rows) * len(columns), K/2, 2) float32, time outermost, columns innermost."""
    shape = (len(times), len(rows), len(columns))
    axes = []
    for axis, (positions, width) in enumerate(zip((times, rows, columns), axis_widths(head_dim), strict=True)):
        view = [1, 1, 1]
        view[axis] = shape[axis]
        axes.append(_axis(positions, width, rounding, device).view(*view, width // 2, 2).expand(*shape, -1, -1))
    return torch.cat(axes, dim=3).flatten(0, 2)


def block_factors(
    block: int, geometry: Geometry, head_dim: int, rounding: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Factors of a block's noisy tokens: absolute time positions 3n, 3n+1, 3n+2."""
    first = LATENTS_PER_BLOCK * block
    rows, columns = geometry.grid
    times = range(first, first + LATENTS_PER_BLOCK)
    return grid_factors(times, range(rows), range(columns), head_dim, rounding, device)


def reference_position(first_latent: int, distance: int) -> int:
    """Time position of the reference seen from a block: at least `distance` latents ahead of its first latent."""
    return max(REFERENCE_POSITION, first_latent + distance)


def reference_factors(
    position: int, geometry: Geometry, head_dim: int, rounding: bool, device: torch.device | str = "cpu"
) -> Tensor:
    rows, columns = geometry.grid
    return grid_factors(range(position, position + 1), range(rows), range(columns), head_dim, rounding, device)


def motion_factors(geometry: Geometry, head_dim: int, rounding: bool, device: torch.device | str = "cpu") -> Tensor:
    """Factors of the packed motion tokens; they never move. Coarse patches sit on the fine grid's coordinates."""
    rows, columns = geometry.grid
    tables = []
    for times, (n_rows, n_columns) in zip(MOTION_TIMES, geometry.motion_grids, strict=True):
        ys = np.linspace(0, rows - 1, n_rows).astype(int).tolist()
        xs = np.linspace(0, columns - 1, n_columns).astype(int).tolist()
        tables.append(grid_factors(times, ys, xs, head_dim, rounding, device))
    return torch.cat(tables)
