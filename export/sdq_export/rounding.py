"""Rounding by a number format, and fake quantization, in torch (docs/quantization.md, "The grid")."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.formats import NumberFormat
from sdq_engines.lowering.graph import array_type

__all__ = ["as_numpy", "code_steps", "fake_quantize", "round_", "stored_dtype"]


def stored_dtype(format: NumberFormat) -> torch.dtype:
    """The type in which a quantized checkpoint keeps the format's codes."""
    found = getattr(torch, format.stored)
    assert isinstance(found, torch.dtype)
    return found


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as an array; codes of a float format as ml_dtypes' type of that name, which torch lacks."""
    if not tensor.is_floating_point() or tensor.element_size() > 1:
        return tensor.numpy()
    return tensor.view(torch.uint8).numpy().view(array_type(str(tensor.dtype).removeprefix("torch.")))


def round_(x: Tensor, format: NumberFormat) -> Tensor:
    """Round to the nearest code of the format, half to even, clipped to its limits; FP32, in place.

    Integers by torch.round; floats by torch's own conversion, which rounds as ONNX's QuantizeLinear does (FP32 to
    E4M3FN; its conversion makes NaN of what is beyond the limits, so that is clipped first).

    Args:
        x: x / s, FP32 of any shape; overwritten.
        format: whose codes.

    Returns:
        x.
    """
    if format.kind == "integer":
        return x.round_().clamp_(format.low, format.high)
    return x.copy_(x.clamp_(format.low, format.high).to(stored_dtype(format)))


def fake_quantize(x: Tensor, scale: Tensor, format: NumberFormat) -> Tensor:
    """s * round(x / s), the nearest number of the format, in FP32.

    Args:
        x: any shape.
        scale: broadcasts over x, positive.
        format: whose codes x / s is rounded to.
    """
    return round_(x.float() / scale, format) * scale


def code_steps(codes: Tensor, format: NumberFormat) -> Tensor:
    """How many codes each one is above zero (below: negative), int32; neighbours differ by one, also of a float format.

    Args:
        codes: FP32, each one of the format's.
        format: theirs.
    """
    if format.kind == "integer":
        return codes.to(torch.int32)
    # sign and magnitude: the bits of the magnitude count up by one from number to number
    bits = codes.to(stored_dtype(format)).view(torch.uint8).to(torch.int32)
    return torch.where(bits >= 128, 128 - bits, bits)
