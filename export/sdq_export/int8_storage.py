"""INT8 weights for what is computed once per prompt: half of FP16's bytes, one scale per output channel.

The weights are rounded in the reference before anything is captured or compared, so that storing loses nothing more,
as FP16 storage does. Scales have 11 significant bits: every multiple of one that is stored is an exact FP32 number, and
the scale is found again from the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_export.families.time_path import FrozenLinear
from sdq_export.stepping import StepDenoiser

__all__ = ["as_integers", "prologue_layers", "round_to_int8_"]

_LARGEST = 127
_SIGNIFICANT_BITS = 11


def prologue_layers(denoiser: StepDenoiser) -> list[str]:
    """Paths of the linear layers that a package computes once per prompt: those that are not left to quantize."""
    every_step = denoiser.family.quantizable_layers(denoiser.model)
    modules = denoiser.model.named_modules()
    return [path for path, part in modules if isinstance(part, nn.Linear | FrozenLinear) and path not in every_step]


@torch.no_grad()
def round_to_int8_(denoiser: StepDenoiser, layers: list[str]) -> None:
    """Round weights to integers -127..127 times a scale per output channel, in place, still typed FP32."""
    for layer in layers:
        weight: Tensor = denoiser.model.get_submodule(layer).weight
        scale = _scales(weight)
        weight.copy_(torch.round(weight / scale) * scale)


def as_integers(weight: NDArray[np.float32], channel_axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """The integers and scales [C_out] of a weight that `round_to_int8_` has rounded; None if it has not.

    Args:
        weight: a matrix.
        channel_axis: of its output channels.
    """
    largest = np.abs(weight).max(axis=1 - channel_axis, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1)).astype(np.float32)
    integers = np.rint(weight / scale)
    if not np.array_equal(integers.astype(np.float32) * scale, weight):
        return None
    stored: NDArray[Any] = integers.astype(np.int8)
    return stored, scale.reshape(-1)


def _scales(weight: Tensor) -> Tensor:
    """[C_out, 1]: the largest magnitude over 127, rounded up to 11 significant bits; 1 where all are zero."""
    needed = weight.abs().amax(dim=1, keepdim=True).double() / _LARGEST
    mantissa, exponent = torch.frexp(needed)
    steps = torch.ceil(torch.ldexp(mantissa, torch.tensor(_SIGNIFICANT_BITS)))
    scale = torch.ldexp(steps, exponent - _SIGNIFICANT_BITS)
    return torch.where(needed > 0, scale, 1.0).to(weight.dtype)
