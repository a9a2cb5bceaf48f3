"""4-bit weights as INT4 tensors: two to a byte in the file."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sdq_engines.lowering.graph import array_of, quantized_layers, retype_constant

__all__ = ["PackInt4Weights"]


class PackInt4Weights(ir.passes.InPlacePass):
    """Retype the weights of layers marked ``w4*`` from INT8 to INT4; ONNX stores those packed.

    Requires: their integers are in [-8, 7].
    Ensures: each such layer's DequantizeLinear reads an INT4 constant.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Retype in place."""
        modified = False
        for value in _four_bit_weights(model):
            if value.dtype != ir.DataType.INT4:
                retype_constant(value, ml_dtypes.int4)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def requires(self, model: ir.Model) -> None:
        """The integers fit."""
        for value in _four_bit_weights(model):
            integers = array_of(value)
            assert integers is not None
            low, high = int(np.min(integers.astype(np.int8))), int(np.max(integers.astype(np.int8)))
            if low < -8 or high > 7:
                raise ir.passes.PreconditionError(f"{value.name} holds {low} to {high}; INT4 holds -8 to 7")

    def ensures(self, model: ir.Model) -> None:
        """All of them are INT4."""
        left = [value.name for value in _four_bit_weights(model) if value.dtype != ir.DataType.INT4]
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} is not INT4")


def _four_bit_weights(model: ir.Model) -> Iterator[ir.Value]:
    for layer in quantized_layers(model):
        if layer.precision.startswith("w4"):
            dequantize = layer.weight_dequantize
            if dequantize is None or dequantize.inputs[0] is None:
                raise ir.passes.PreconditionError(f"{layer.name} is marked {layer.precision} and has no integer weight")
            yield dequantize.inputs[0]
