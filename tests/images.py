"""How near two pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def psnr(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """In dB, of arrays in [0, 1]; 120 where they are equal."""
    return float(-10 * np.log10(max(np.mean((found.astype(np.float64) - wanted) ** 2), 1e-12)))
