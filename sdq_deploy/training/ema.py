"""A moving average of the student's parameters, to be measured and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage"]


class MovingAverage:
    """average = decay * average + (1 - decay) * parameter after each step; decay 0 keeps none.

    Args:
        model: whose parameters to follow.
        decay: 0 <= decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(model.parameters()) if decay else []
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters after a step."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the length of the block."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(before)

    def state_dict(self) -> list[Tensor]:
        """For the resume point."""
        return self.averages

    def load_state_dict(self, saved: list[Tensor]) -> None:
        """Continue from a resume point."""
        for average, value in zip(self.averages, saved, strict=True):
            average.copy_(value)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
