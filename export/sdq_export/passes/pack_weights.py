"""Weights in the narrow type of their format: INT4, of which ONNX stores two to a byte."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sdq_engines.formats import NumberFormat
from sdq_engines.lowering.graph import array_of, array_type, quantized_layers, retype_constant

__all__ = ["PackWeights"]


class PackWeights(ir.passes.InPlacePass):
    """Retype the weights whose format a checkpoint stores in a wider type than a package (INT4 as INT8).

    Requires: their codes are within the format's limits.
    Ensures: each such layer's DequantizeLinear reads a constant of the format's own type.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype in place."""
        modified = False
        for value, format in _packed_weights(model):
            if value.dtype != ir.DataType[format.onnx_type]:
                retype_constant(value, array_type(format.array_type))
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def requires(self, model: ir.Model) -> None:
        """The codes fit."""
        for value, format in _packed_weights(model):
            codes = array_of(value)
            assert codes is not None
            wide = codes.astype(array_type(format.stored))
            low, high = float(np.min(wide)), float(np.max(wide))
            if low < format.low or high > format.high:
                raise ir.passes.PreconditionError(
                    f"{value.name} holds {low:g} to {high:g}; {format.title} holds {format.low:g} to {format.high:g}"
                )

    def ensures(self, model: ir.Model) -> None:
        """All of them are of their own type."""
        for value, format in _packed_weights(model):
            if value.dtype != ir.DataType[format.onnx_type]:
                raise ir.passes.PostconditionError(f"{value.name} is not {format.title}")


def _packed_weights(model: ir.Model) -> Iterator[tuple[ir.Value, NumberFormat]]:
    for layer in quantized_layers(model):
        if layer.formats.weight.is_packed:
            dequantize = layer.weight_dequantize
            if dequantize is None or dequantize.inputs[0] is None:
                raise ir.passes.PreconditionError(f"{layer.name} is marked {layer.precision} and has no integer weight")
            yield dequantize.inputs[0], layer.formats.weight
