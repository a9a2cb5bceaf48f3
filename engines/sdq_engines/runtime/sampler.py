"""The package's sampler: its coefficient rows and what goes with them (docs/package-format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import SamplerInfo

__all__ = ["SamplerTables"]


_AGAIN = "Get the package again from its source, or export it again."


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
    def load(cls, path: Path, sampler: SamplerInfo) -> SamplerTables:
        """Read sampler.safetensors.

        Raises:
            SdqError: it is damaged, or its numbers are of another sampler than the manifest's.
        """
        from safetensors.numpy import load

        calls, slots = sampler.num_calls, 1 + sampler.history
        wanted = {
            "coefficients": (None, calls, slots * slots + 3 * slots),
            "timesteps": (calls,),
            "init_noise_sigma": (None,),
            "noising": (calls, 2),
        }
        try:
            tensors = load(path.read_bytes())
        except Exception as error:  # safetensors raises an exception of its own
            raise SdqError(f"{path} cannot be read: {error}.", _AGAIN) from error
        for name, shape in wanted.items():
            has = tensors[name].shape if name in tensors else None
            if (
                has is None
                or len(has) != len(shape)
                or any(a not in (None, b) for a, b in zip(shape, has, strict=True))
            ):
                found = "no such tensor" if has is None else f"one of shape {list(has)}"
                raise SdqError(
                    f"{path} has {found} as {name}; the manifest has {calls} calls and {slots - 1} history slots.",
                    _AGAIN,
                )
        return cls(*(tensors[name] for name in wanted))
