"""What stands in the place of a denoiser's time path: rows of a table, and projections that training leaves alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdq_export.step_state import StepState

__all__ = ["NoTimeProjection", "StepRow"]


class StepRow(nn.Module):
    """Row `step` of a table, whatever it is called with.

    Args:
        table: FP32 [T, ...].
        state: holds the batch's steps.
    """

    table: Tensor

    def __init__(self, table: Tensor, state: StepState) -> None:
        super().__init__()
        self.state = state
        self.register_buffer("table", table.detach().to(torch.float32), persistent=False)

    def forward(self, *_: Any) -> Tensor:
        """Rows [B, ...] of the batch's steps."""
        return self.table[self.state.steps]


class NoTimeProjection(nn.Module):
    """Where the sinusoids of the timestep were: `StepRow` needs none."""

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B, 1], not read."""
        return timesteps.reshape(-1, 1)
