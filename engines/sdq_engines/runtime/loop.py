"""The denoising loop: one engine call per step and nothing else of weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdq_engines.backends.base import Stepper
from sdq_engines.runtime.noise import NoiseStream

__all__ = ["LoopTime", "StepEvent", "denoise"]


@dataclass(frozen=True)
class StepEvent:
    """What a callback hears after each step."""

    step: int
    """Index of the step just done, 0..num_steps-1."""
    num_steps: int
    """Of this run: fewer than the package's where it began from an image."""
    images: range
    """Which images of the call are in this batch."""
    latents: Callable[[], np.ndarray]
    """The latents now, FP32 [batch, C, h, w]; fetched only if called."""


@dataclass
class LoopTime:
    """Seconds spent in a loop, and of those in the engine."""

    total: float = 0.0
    engine: float = 0.0

    @property
    def outside(self) -> float:
        """The share of the loop's time outside the engine's calls."""
        return 1 - self.engine / self.total if self.total else 0.0


def denoise(
    stepper: Stepper,
    num_steps: int,
    shape: tuple[int, ...],
    images: range,
    streams: Sequence[NoiseStream] | None = None,
    callback: Callable[[StepEvent], None] | None = None,
    first: int = 0,
    blend: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, LoopTime]:
    """Run the steps of one batch, from model call `first` on.

    Args:
        stepper: a run just started.
        num_steps: T, the model calls.
        shape: (C, h, w) of one image's latents.
        images: indices of the batch's images, for the callback.
        streams: for a stochastic sampler, each image's noise, which the steps continue.
        callback: called after each step.
        first: the first model call to make.
        blend: changes the latents after each call, given its index; None leaves them in the engine.

    Returns:
        The final latents, FP32 [batch, C, h, w], and where the time went.
    """
    spent = LoopTime()
    started = time.perf_counter()
    for index in range(first, num_steps):
        noise = np.stack([stream.normal(shape) for stream in streams]) if streams else None
        called = time.perf_counter()
        stepper.step(index, noise)
        spent.engine += time.perf_counter() - called
        if blend is not None:
            stepper.replace(blend(index, stepper.latents()))
        if callback is not None:
            callback(StepEvent(index - first, num_steps - first, images, stepper.latents))
    called = time.perf_counter()
    latents = stepper.latents()  # waits for a GPU
    spent.engine += time.perf_counter() - called
    spent.total = time.perf_counter() - started
    return latents, spent
