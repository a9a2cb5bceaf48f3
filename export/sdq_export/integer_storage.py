"""Weights stored as integers, computed with in floating point: half of FP16's bytes as INT8, some 0.28 as INT4.

For what a run computes once or twice and not at every step: text encoders, prologue, VAE. INT8 has one scale per output
channel (of an embedding: per row). INT4 has one per block of 64 inputs of a linear layer, the rest is INT8.

The weights are rounded in the reference before anything is captured or compared, so that storing loses nothing more,
as FP16 storage does. Scales have 11 significant bits: every multiple of one that is stored is an exact FP32 number, and
the scale is found again from the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_engines.formats import INT4, INT8
from sdq_export.quantspec import fitting_block
from sdq_export.storage import IntegerDtype
from sdq_export.time_path import FrozenLinear

__all__ = ["as_integers", "block_of", "component_layers", "round_to_integers_"]

_BLOCK = 64
_SIGNIFICANT_BITS = 11
_SMALLEST_SCALE = 2.0**-24
"""FP16's smallest number: an engine that computes in FP16 can hold every scale."""


def component_layers(component: nn.Module) -> list[str]:
    """Paths of a text encoder's or VAE's convolutions, linear layers and token embedding.

    Other embeddings, of positions, are small, and the graph adds them as constants.
    """
    model: Any = component
    tokens = model.get_input_embeddings() if hasattr(component, "get_input_embeddings") else None
    modules = component.named_modules()
    return [path for path, part in modules if isinstance(part, nn.Linear | nn.Conv2d) or part is tokens]


def block_of(inputs: int) -> int | None:
    """How many inputs of a linear layer share an INT4 scale; None for a layer that stays INT8."""
    return fitting_block(inputs, _BLOCK)


@torch.no_grad()
def round_to_integers_(module: nn.Module, layers: Iterable[str], dtype: IntegerDtype) -> None:
    """Round weights to integers (-127..127, or -7..7 in a linear layer's INT4) times a scale, in place, still FP32.

    Args:
        module: on the CPU.
        layers: paths of its layers.
        dtype: INT4 for linear layers whose inputs a block divides, for the others INT8 in any case.
    """
    for layer in layers:
        part: Any = module.get_submodule(layer)
        weight: Tensor = part.weight
        block = block_of(weight.shape[1]) if dtype == "int4" and isinstance(part, nn.Linear | FrozenLinear) else None
        groups = _groups(weight.detach().numpy(), block)
        largest = (INT8 if block is None else INT4).high
        scale = _scales(np.abs(groups).max(axis=-1, keepdims=True), largest)
        weight.copy_(torch.from_numpy(np.rint(groups / scale) * scale).reshape(weight.shape))


def as_integers(
    weight: NDArray[np.float32], channel_axis: int, block: int | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """The integers and scales of a weight that `round_to_integers_` has rounded; None if it has not.

    Args:
        weight: two axes or more.
        channel_axis: of its output channels.
        block: inputs, along the other axis of a matrix, that share an INT4 scale; None for INT8.

    Returns:
        Integers of the weight's shape, and scales: [C_out], or with blocks the weight's shape with its inputs' axis
        divided by the block.
    """
    rows = np.moveaxis(weight, channel_axis, 0)
    groups = _groups(rows, block)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    steps = np.float32((INT8 if block is None else INT4).high)
    scale = np.where(largest > 0, np.maximum(largest / steps, np.float32(_SMALLEST_SCALE)), np.float32(1))
    integers = np.rint(groups / scale)
    if not np.array_equal(integers.astype(np.float32) * scale, groups):
        return None
    stored: NDArray[Any] = np.moveaxis(integers.astype(np.int8).reshape(rows.shape), 0, channel_axis)
    return stored, scale.reshape(-1) if block is None else np.moveaxis(scale[..., 0], 0, channel_axis)


def _groups(rows: NDArray[np.float32], block: int | None) -> NDArray[np.float32]:
    """[C_out, groups, n]: the numbers that share a scale along the last axis."""
    return rows.reshape(len(rows), 1, -1) if block is None else rows.reshape(len(rows), -1, block)


def _scales(magnitude: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    """The largest magnitudes over the largest integer, rounded up to 11 significant bits; 1 where all are zero."""
    needed = magnitude.astype(np.float64) / largest
    mantissa, exponent = np.frexp(needed)
    steps = np.ceil(np.ldexp(mantissa, _SIGNIFICANT_BITS))
    scale = np.maximum(np.ldexp(steps, exponent - _SIGNIFICANT_BITS), _SMALLEST_SCALE)
    return np.where(needed > 0, scale, 1.0).astype(np.float32)
