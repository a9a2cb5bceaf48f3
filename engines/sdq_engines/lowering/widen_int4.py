"""INT4 weights of layers with INT8 activations become INT8, with the same values and the same scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdq_engines.lowering.graph import quantized_layers, retype_constant

__all__ = ["WidenInt4"]


class WidenInt4(ir.passes.InPlacePass):
    """Widen packed INT4 weight constants to INT8 where the layer computes INT8 x INT8.

    The 4-bit grid [-8, 7] is a subset of the 8-bit one, so the layer's result does not change by one bit. Engines have
    INT8 x INT8 kernels; none has INT4 x INT8, and TensorRT refuses most ways of asking for it (docs/quantization.md).

    Requires: nothing.
    Ensures: no layer marked w4a8 has an INT4 weight. Cases:
    1. a w4a8 layer with an INT4 constant: widened, and a zero point, where there is one, with it;
    2. a w4a16 layer: left alone, unless `weight_only` asks for it (a backend without INT4 kernels).
    """

    def __init__(self, weight_only: bool = False) -> None:
        super().__init__()
        self.precisions = {"w4a8", "w4a16"} if weight_only else {"w4a8"}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for layer in quantized_layers(model):
            if layer.precision not in self.precisions or (dequantize := layer.weight_dequantize) is None:
                continue
            for value in (dequantize.inputs[0], *dequantize.inputs[2:]):  # the integers and the optional zero point
                if value is None or value.dtype != ir.DataType.INT4:
                    continue
                retype_constant(value, np.int8)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for layer in quantized_layers(model):
            dequantize = layer.weight_dequantize
            integers = dequantize.inputs[0] if dequantize is not None else None
            if layer.precision in self.precisions and integers is not None and integers.dtype == ir.DataType.INT4:
                raise ir.passes.PostconditionError(f"{layer.name}: its weight is INT4, INT8 was wanted")
