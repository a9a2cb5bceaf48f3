"""The step, passed explicitly: what a wrapper sets for each call, and quantizers and time tables look up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["StepState"]


class StepState:
    """The steps of the samples that are passing through the denoiser: int64 [B], one a sample."""

    def __init__(self) -> None:
        self._steps: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """The batch's steps, int64 [B].

        Raises:
            RuntimeError: no call of the denoiser is under way.
        """
        if self._steps is None:
            raise RuntimeError("the step is known only inside a call of StepDenoiser")
        return self._steps

    @contextlib.contextmanager
    def during(self, steps: Tensor) -> Iterator[None]:
        """Set the steps for the block, and restore what was there before."""
        before, self._steps = self._steps, steps
        try:
            yield
        finally:
            self._steps = before

    def checkpointing(self) -> Callable[..., Any]:
        """A gradient checkpointing function that restores the steps of the forward when it recomputes.

        The recompute runs in the backward, when another forward may have set other steps, or none is set; a plain
        checkpoint would then look up the wrong rows without a word.
        """

        def run(module: nn.Module, *args: Any) -> Any:
            steps = self.steps

            def forward(*inputs: Any) -> Any:
                with self.during(steps):
                    return module(*inputs)

            return checkpoint(forward, *args, use_reentrant=False)

        return run
