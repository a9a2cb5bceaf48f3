"""How near two computations of the same numbers must be (CONTRIBUTING.md says which tests can promise what)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOAT_NOISE", "is_the_same_quantized_network", "relative"]

#: Relative L2 distance of two floating-point computations of the same thing: other kernels, another order of sums.
FLOAT_NOISE = 1e-5


def relative(found: Any, wanted: Any) -> float:
    """L2 distance, relative to what was wanted; of tensors or arrays."""
    one, other = (torch.as_tensor(each).double() for each in (found, wanted))
    return float((one - other).norm() / other.norm())


def is_the_same_quantized_network(found: Tensor, wanted: Tensor, exact: Tensor) -> bool:
    """Whether outputs of two instances of one quantized network differ by less than the network from the exact one.

    A difference of 1e-6 in the input of a tiny quantized network, which moves some value over the edge of its grid, was
    measured to make up to a quarter of that distance.
    """
    return relative(found, wanted) <= 0.5 * relative(exact, wanted)
