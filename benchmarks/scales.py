"""Weight scales that nothing was searched or trained for: enough for sizes, speed and parity."""

from __future__ import annotations

from torch import Tensor

from sdq_export.quantspec import WeightSite, grid_limits


def largest_value_scale(weight: Tensor, site: WeightSite) -> Tensor:
    """[C_out] or [C_out, blocks]: the largest value is the grid's end."""
    blocks = 1 if site.block_size is None else weight.shape[1] // site.block_size
    largest = weight.detach().float().reshape(weight.shape[0], blocks, -1).abs().amax(-1)
    scale = (largest / grid_limits(site.bits)[1]).clamp_min(1e-6)
    return scale if site.block_size is not None else scale[:, 0]
