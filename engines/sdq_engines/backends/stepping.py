"""Denoising on a backend whose memory is the host's: outputs of one call are the inputs of the next, uncopied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sdq_engines.backends.base import Arrays, Component

if TYPE_CHECKING:
    from sdq_engines.package.schema import Manifest

__all__ = ["HostStepper"]


class HostStepper:
    """A run through any component that takes and gives numpy arrays (see `backends.base.Stepper`)."""

    def __init__(
        self,
        denoiser: Component,
        manifest: Manifest,
        latents: np.ndarray,
        guidance_scale: float,
        coefficients: np.ndarray,
        prompt: Arrays,
    ) -> None:
        self.denoiser = denoiser
        self.feeds: Arrays = dict(prompt)
        self.feeds["latents"] = np.ascontiguousarray(latents, np.float32)
        self.feeds["guidance_scale"] = np.asarray(guidance_scale, np.float32)
        if history := manifest.sampler.history:
            self.feeds["history"] = np.zeros((latents.shape[0], history, *latents.shape[1:]), np.float32)
        self.calls = [(np.asarray(i, np.int64), np.ascontiguousarray(row)) for i, row in enumerate(coefficients)]

    def step(self, index: int, noise: np.ndarray | None) -> None:
        self.feeds["step"], self.feeds["coefficients"] = self.calls[index]
        if noise is not None:
            self.feeds["noise"] = noise
        outputs = self.denoiser.run(self.feeds)
        self.feeds["latents"] = outputs["latents_out"]
        if "history_out" in outputs:
            self.feeds["history"] = outputs["history_out"]

    def latents(self) -> np.ndarray:
        return np.array(self.feeds["latents"])

    def replace(self, latents: np.ndarray) -> None:
        self.feeds["latents"] = np.ascontiguousarray(latents, np.float32)

    def close(self) -> None:
        pass
