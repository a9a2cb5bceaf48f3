"""The package's sampler: its coefficient rows and what goes with them (docs/package-format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["SamplerTables"]


@dataclass(frozen=True)
class SamplerTables:
    """Numbers measured from the scheduler at export, FP32."""

    coefficients: np.ndarray
    """[starts, T, R]: row [start, i] is for model call i of a run that begins at `start`."""
    timesteps: np.ndarray
    """[T]"""
    init_noise_sigma: np.ndarray
    """[starts]: the starting latents are noise times this."""
    noising: np.ndarray
    """[starts, 2]: an image's latents at the level of model call i are a * clean + b * noise."""

    @classmethod
    def load(cls, path: Path) -> SamplerTables:
        """Read sampler.safetensors."""
        from safetensors.numpy import load_file

        tensors = load_file(path)
        names = ("coefficients", "timesteps", "init_noise_sigma", "noising")
        return cls(*(tensors[name] for name in names))
