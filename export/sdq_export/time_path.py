"""What stands in the place of a denoiser's time path: rows of a table, and projections that training leaves alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdq_export.step_state import StepState

__all__ = ["FrozenLinear", "NoTimeProjection", "StepRow", "freeze_linears_"]


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


class FrozenLinear(nn.Module):
    """A Linear whose weight and bias are buffers, not parameters; it computes in its own precision, autocast or not.

    For what a denoiser still computes of the step and the prompt alone: in a package the prologue has done that. The
    buffers have the parameters' names, so a state dict, and what export takes from it, stays the same.

    Args:
        linear: is not changed; the buffers share its memory.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, [..., C_out]."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


def freeze_linears_(module: nn.Module) -> None:
    """Replace every Linear inside `module`, which is none itself, by a FrozenLinear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, FrozenLinear(child))
        else:
            freeze_linears_(child)


class NoTimeProjection(nn.Module):
    """Where the sinusoids of the timestep were: `StepRow` needs none."""

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B, 1], not read."""
        return timesteps.reshape(-1, 1)
