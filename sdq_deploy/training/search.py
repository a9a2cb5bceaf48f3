"""Initial weight scales: the best of evenly spaced candidates (docs/quantization.md).

The criterion, least sum |x - x_hat|^2.4 over 80 shrinkages of the largest magnitude, is that of Q-Diffusion and
BRECQ (Li et al., 2021): it prefers clipping a few outliers over coarse steps for all, less eagerly than the square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdq_engines.formats import NumberFormat
from sdq_export.rounding import round_

__all__ = ["max_scale", "search_scale", "search_weight_scale"]

#: Elements that one pass works on: few passes, yet of bounded memory.
CHUNK = 1 << 20


def max_scale(largest: Tensor, format: NumberFormat) -> Tensor:
    """The scale that just holds the magnitude `largest`, f32 of any shape; positive even where that is 0."""
    return torch.where(largest > 0, largest, torch.ones_like(largest)) / format.high


@torch.no_grad()
def search_scale(rows: Tensor, format: NumberFormat, points: int = 80, power: float = 2.4) -> Tensor:
    """Per row, the scale of least sum |x - x_hat|^power among `points` even fractions of `max_scale`.

    Args:
        rows: f32 [R, N], the values that share a scale.
        format: whose codes.
        points: candidates, max_scale * k / points for k = points..1; among equals the widest wins.
        power: exponent of the error.

    Returns:
        f32 [R], positive.
    """
    rows = rows.float()
    widest = max_scale(rows.abs().amax(dim=1), format)
    height = max(1, CHUNK // max(1, rows.shape[1]))
    parts = zip(torch.split(rows, height), torch.split(widest, height), strict=True)
    return torch.cat([_search_chunk(part, top, format, points, power) for part, top in parts])


def _search_chunk(rows: Tensor, widest: Tensor, format: NumberFormat, points: int, power: float) -> Tensor:
    best, best_error = widest.clone(), torch.full_like(widest, float("inf"))
    scratch = torch.empty_like(rows)
    for point in range(points, 0, -1):
        scale = widest * (point / points)
        torch.mul(rows, (1.0 / scale)[:, None], out=scratch)
        round_(scratch, format).mul_(scale[:, None]).sub_(rows).abs_()
        # exp2(p log2 x) is three times as fast as pow on a CPU, and right at 0.
        error = scratch.log2_().mul_(power).exp2_().sum(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def search_weight_scale(weight: Tensor, format: NumberFormat, *, points: int = 80, power: float = 2.4) -> Tensor:
    """Scales of a weight: per output channel, f32 [C_out]; in blocks along the input, f32 [C_out, blocks].

    Args:
        weight: [C_out, ...] of a Conv2d or Linear.
        format: by channel, or in blocks of a Linear's input.
        points: candidates per scale.
        power: exponent of the error.
    """
    channels = weight.shape[0]
    rows = weight.detach().reshape(channels, -1)
    if format.block_size is None:
        return search_scale(rows, format, points, power)
    return search_scale(rows.reshape(-1, format.block_size), format, points, power).reshape(channels, -1)
