"""What the floating-point network's activations look like, channel by channel, over the serial dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdq_deploy.training.dataset import SerialData
from sdq_deploy.training.outputs import outputs_on
from sdq_export.stepping import StepDenoiser

__all__ = ["ChannelStatistics", "channel_statistics"]

#: Latents that go through the denoiser together.
BATCH = 16


@dataclass
class ChannelStatistics:
    """Of one layer's input, over all samples and positions.

    Attributes:
        largest: f32 [C], the largest magnitude.
        total: f32 [C], the sum of the magnitudes.
        count: positions seen.
        gram: f32 [C, C], X^T X; None unless asked for.
    """

    largest: Tensor
    total: Tensor
    count: int
    gram: Tensor | None

    @property
    def mean(self) -> Tensor:
        """f32 [C], the mean magnitude."""
        return self.total / max(1, self.count)

    def add(self, x: Tensor) -> None:
        """Take positions [N, C]."""
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self.total += x.abs().sum(dim=0)
        self.count += len(x)
        if self.gram is not None:
            self.gram += x.T @ x


@torch.no_grad()
def channel_statistics(
    denoiser: StepDenoiser, layers: Sequence[str], data: SerialData, samples_per_step: int, *, gram: bool = False
) -> dict[str, ChannelStatistics]:
    """Run the denoiser over the dataset and look at the inputs of these layers.

    Args:
        denoiser: floating-point.
        layers: Linear, or Conv2d whose input channels are looked at position by position.
        data: the serial dataset.
        samples_per_step: latents of each step, with and without their prompts.
        gram: whether to keep X^T X.
    """
    found: dict[str, ChannelStatistics] = {}
    rows = torch.cat([data.at_step(step, samples_per_step) for step in range(denoiser.num_steps)])
    with _watching(denoiser, layers, found, gram):
        for part in torch.split(rows, BATCH):
            outputs_on(denoiser, data, part)
    return found


@contextmanager
def _watching(
    denoiser: StepDenoiser, layers: Sequence[str], found: dict[str, ChannelStatistics], gram: bool
) -> Iterator[None]:
    def watch(layer: str) -> torch.utils.hooks.RemovableHandle:
        module: nn.Module = denoiser.model.get_submodule(layer)

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            x = x.flatten(0, -2)
            if layer not in found:
                zeros = x.new_zeros(x.shape[1])
                found[layer] = ChannelStatistics(
                    zeros, zeros.clone(), 0, x.new_zeros(x.shape[1], x.shape[1]) if gram else None
                )
            found[layer].add(x)

        return module.register_forward_pre_hook(look)

    handles = [watch(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
