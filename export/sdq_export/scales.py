"""Weight scales that nothing was searched or trained for: enough for sizes, speed and parity."""

from __future__ import annotations

from torch import Tensor

from sdq_export.quantspec import WeightSite


def largest_value_scale(weight: Tensor, site: WeightSite) -> Tensor:
    """[C_out] or [C_out, blocks]: the largest value is the grid's end."""
    size = site.format.block_size
    blocks = 1 if size is None else weight.shape[1] // size
    largest = weight.detach().float().reshape(weight.shape[0], blocks, -1).abs().amax(-1)
    scale = (largest / site.format.high).clamp_min(1e-6)
    return scale if size is not None else scale[:, 0]
