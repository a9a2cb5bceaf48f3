"""Selective freezing: weights of sensitive layers that oscillate between integers are pinned (docs/quantization.md).

After Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022), on the sensitive layers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sdq_deploy.recipes.schema import Freezing
from sdq_deploy.training.student import Student
from sdq_export.checkpoint import dequantize_weight, quantize_weight
from sdq_export.quantspec import WeightSite

__all__ = ["FreezingTracker", "Oscillation", "freezing_threshold"]

#: Bits up to which a grid is coarse enough to oscillate.
MOST_BITS = 4


def freezing_threshold(settings: Freezing, step: int, total: int) -> float:
    """The oscillation frequency above which a weight is pinned: a cosine from the start's value to the end's."""
    progress = min(1.0, step / max(1, total))
    span = settings.threshold_start - settings.threshold_end
    return settings.threshold_end + span * (1 + math.cos(math.pi * progress)) / 2


@dataclass
class Oscillation:
    """What is known of one layer's weights; every tensor has the weight's shape.

    Attributes:
        integers: int8, the weight's integers after the last step.
        direction: int8, sign of the last change, 0 before the first.
        frequency: f32, f = m * o + (1 - m) * f, o = [the integer changed, against the last change's direction].
        average: f32, moving average of the integers.
        frozen: bool.
        pinned: int8, the integer that a frozen weight keeps.
    """

    integers: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor
    pinned: Tensor

    @classmethod
    def begin(cls, integers: Tensor) -> Oscillation:
        """Nothing has moved yet."""
        return cls(
            integers=integers.clone(),
            direction=torch.zeros_like(integers),
            frequency=torch.zeros_like(integers, dtype=torch.float32),
            average=integers.float(),
            frozen=torch.zeros_like(integers, dtype=torch.bool),
            pinned=integers.clone(),
        )

    def update(self, integers: Tensor, momentum: float, threshold: float) -> None:
        """Take the integers after a step; pin those that oscillate too often at the rounded average."""
        change = torch.sign(integers.to(torch.int16) - self.integers.to(torch.int16)).to(torch.int8)
        flipped = (change != 0) & (change == -self.direction)
        self.frequency.lerp_(flipped.float(), momentum)
        self.average.lerp_(integers.float(), momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.integers = integers.clone()
        newly = (self.frequency > threshold) & ~self.frozen
        self.pinned = torch.where(newly, self.average.round().to(torch.int8), self.pinned)
        self.frozen |= newly


def _oscillates(site: WeightSite) -> bool:
    return site.format.kind == "integer" and site.format.bits <= MOST_BITS


class FreezingTracker:
    """Follows the sensitive layers of integers of at most 4 bits, and holds their frozen weights in place.

    Args:
        student: whose weights to follow.
        sensitive: layers; those of more bits, and of floats, are left alone.
        settings: of the recipe.
    """

    def __init__(self, student: Student, sensitive: Sequence[str], settings: Freezing) -> None:
        self.student, self.settings = student, settings
        sites = student.spec.weight_sites
        self.sites: dict[str, WeightSite] = {
            layer: sites[layer] for layer in sensitive if settings.enabled and _oscillates(sites[layer])
        }
        self.states = {layer: Oscillation.begin(self._integers(layer)) for layer in self.sites}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Update after the optimizer's step number `step` of `total`, and put frozen weights back on their integers."""
        threshold = freezing_threshold(self.settings, step, total)
        for layer, state in self.states.items():
            state.update(self._integers(layer), self.settings.momentum, threshold)
            weight = self.student.weight(layer)
            held = dequantize_weight(state.pinned, self.student.weight_scale(layer), self.sites[layer])
            weight.copy_(torch.where(state.frozen, held, weight))

    def fractions(self) -> tuple[float, float]:
        """(oscillating, frozen) share of the followed weights; oscillating means oftener than the last threshold."""
        total = sum(state.frozen.numel() for state in self.states.values())
        if not total:
            return 0.0, 0.0
        moving = sum(int((state.frequency > self.settings.threshold_end).sum()) for state in self.states.values())
        return moving / total, sum(int(state.frozen.sum()) for state in self.states.values()) / total

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For the resume point."""
        return {layer: dict(vars(state)) for layer, state in self.states.items()}

    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Continue from a resume point."""
        for layer, state in self.states.items():
            for field in fields(state):
                setattr(state, field.name, saved[layer][field.name].to(state.frozen.device))

    def _integers(self, layer: str) -> Tensor:
        weight = self.student.weight(layer).detach()
        return quantize_weight(weight, self.student.weight_scale(layer).detach(), self.sites[layer])
