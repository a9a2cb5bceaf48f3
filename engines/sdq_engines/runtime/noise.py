"""The noise that `torch.randn` draws from a seeded CPU generator, in numpy.

Reproduces ATen's CPU `normal_` (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill` and `normal`) within
5e-7, so a seed gives the image that diffusers would have started from. Two forms, as there:

1. 16 values or more: the low 24 bits of MT19937 words as uniforms, Box-Muller over blocks of 16 (first 8 against last
   8); if the size is no multiple of 16, the last 16 values are drawn again as one more block;
2. fewer: Box-Muller in double precision from 53-bit uniforms (two words each), two values a draw, the second kept for
   the next call.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["NoiseStream"]

_BLOCK = 16


class NoiseStream:
    """One image's stream of standard normal noise; equal to `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        seed: as torch takes it, -2**63 to 2**64 - 1 (negative ones count back from 2**64).
            MT19937 uses the low 32 bits.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"a seed is from -2**63 to 2**64 - 1, not {seed}")
        # RandomState, not default_rng: torch seeds MT19937 the way this legacy class does.
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """FP32 noise of `shape`; each call continues the stream."""
        size = math.prod(shape)
        if size >= _BLOCK:
            return self._blocks(size).reshape(shape)
        return np.array([self._single() for _ in range(size)], np.float32).reshape(shape)

    def _uniform24(self, count: int) -> np.ndarray:
        words = self._words.randint(0, 2**32, count, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float64) / 2**24

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._words.randint(0, 2**32, 2, dtype=np.uint32))
        return ((high << 32 | low) & (2**53 - 1)) / 2**53

    def _blocks(self, size: int) -> np.ndarray:
        uniforms = self._uniform24(size)
        whole = size - size % _BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        if whole != size:
            values[size - _BLOCK :] = _box_muller(self._uniform24(_BLOCK))
        return values

    def _single(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, log_argument = 2 * math.pi * self._uniform53(), self._uniform53()
        radius = math.sqrt(-2 * math.log1p(-log_argument))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Blocks of 16 uniforms -> 16 normals each: the first 8 give radii, the last 8 angles."""
    halves = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log1p(-halves[:, 0]))
    angle = 2 * np.pi * halves[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1).astype(np.float32)
