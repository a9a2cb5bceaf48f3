"""How much of a denoiser's run the gate looks at: all of it, or what a number of calls allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["DEFAULT_CALLS", "Gate", "GateChoice", "choose_gate", "samples_for"]

GateChoice = Literal["auto", "full"] | int
"""`auto` is full for a small denoiser and `DEFAULT_CALLS` for a large one; a number is a budget in calls."""

DEFAULT_CALLS = 12

_LARGE = 100_000_000
"""Parameters. A denoiser of more takes seconds a call on a CPU, and minutes for all of its steps."""

_FEWEST_STEPS = 3
_CALLS_A_PLACE, _CALLS_A_FLOAT_PLACE = 5, 3

_WANTED_ELEMENTS = 2048


@dataclass(frozen=True)
class Gate:
    """What the gate looks at.

    Attributes:
        steps: the model calls of a run, in order.
        samples: images at each of them.
        full: every step, on the teacher's own run. Otherwise the teacher jumps from one of the steps to the next
            (`sdq_export.sampler.jump`), and each layer is compared at one step only.
    """

    steps: tuple[int, ...]
    samples: int
    full: bool

    @property
    def site_steps(self) -> list[int]:
        """Where the layers are compared one by one, and the sampler's update: at ends and middle of a full gate,
        in the middle of another."""
        return ends_and_middle(self.steps) if self.full else [self.steps[len(self.steps) // 2]]

    def calls(self, quantized: bool) -> int:
        """How often the denoiser is called for one image: by torch, by the graph, and layer by layer by both."""
        places, sites = len(self.steps) * self.samples, len(self.site_steps) * self.samples
        return places * (_CALLS_A_PLACE if quantized else _CALLS_A_FLOAT_PLACE) + sites * (3 if quantized else 1)


def ends_and_middle(steps: tuple[int, ...]) -> list[int]:
    """Enough for what is the same graph at every step."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def choose_gate(
    choice: GateChoice, calls: int, latent_shape: tuple[int, int, int], parameters: int, quantized: bool
) -> Gate:
    """What to look at.

    A place, one image at one step, costs a call of the teacher, and one of the reference and of the graph each without
    quantized activations; quantized, one more of each with them. The sampler's update costs one, the layers one by one
    two. A budget buys steps first, evenly spread with both ends, at least three; then images at each.

    Args:
        choice: the user's.
        calls: T, the model calls of a run.
        latent_shape: C, h, w.
        parameters: of the denoiser.
        quantized: whether its activations or weights are.
    """
    most = samples_for(latent_shape)
    if choice == "full" or (choice == "auto" and parameters < _LARGE):
        return Gate(tuple(range(calls)), most, True)
    budget = DEFAULT_CALLS if choice == "auto" else choice
    places = (budget - 3) // _CALLS_A_PLACE if quantized else (budget - 1) // _CALLS_A_FLOAT_PLACE
    count = min(calls, max(_FEWEST_STEPS, places))
    steps = sorted({round(step) for step in np.linspace(0, calls - 1, count)})
    return Gate(tuple(steps), max(1, min(most, places // count)), False)


def samples_for(latent_shape: tuple[int, int, int]) -> int:
    """N of a full gate: enough samples that their average is steady; small latents need more of them."""
    return max(2, min(8, _WANTED_ELEMENTS // int(np.prod(latent_shape))))
