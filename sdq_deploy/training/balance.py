"""SmoothQuant's equation, for ours and for the peers (Xiao et al., "SmoothQuant", 2023, equation 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["column_peaks", "log_balance"]


def column_peaks(weights: Iterable[Tensor]) -> Tensor:
    """The largest magnitude that each input channel is multiplied with, f32 [C_in], of weights [C_out, C_in, ...]."""
    peaks = [weight.detach().float().abs().amax(dim=(0, *range(2, weight.ndim))) for weight in weights]
    return torch.stack(peaks).amax(0)


def log_balance(peaks: Tensor, columns: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """log f_j, f_j = max|X_j|^a / max|W_j|^(1 - a), and which channels it is defined for.

    Args:
        peaks: f32 [C], largest magnitudes of the input's channels.
        columns: f32 [C], of the weight's columns, over all layers that read the input.
        strength: a, the migration strength; 1 evens out the input, 0 the weight.

    Returns:
        f32 [C], 0 for a channel that is always 0 in the input or the weight and so has nothing to balance, and
        bool [C], False for those.
    """
    live = (peaks != 0) & (columns != 0)
    logs = strength * peaks.clamp_min(1e-12).log() - (1 - strength) * columns.clamp_min(1e-12).log()
    return torch.where(live, logs, torch.zeros_like(logs)), live
