"""INT4 weights of layers with INT8 activations become INT8, with the same values and the same scales."""

from __future__ import annotations

import onnx_ir as ir

from sdq_engines.formats import LayerFormats, NumberFormat, number_format
from sdq_engines.lowering.graph import array_type, quantized_layers, retype_constant

__all__ = ["WidenInt4"]


class WidenInt4(ir.passes.InPlacePass):
    """Widen packed INT4 weight constants to INT8 where the layer computes INT8 x INT8.

    The 4-bit grid [-8, 7] is a subset of the 8-bit one, so the layer's result does not change by one bit. Engines have
    INT8 x INT8 kernels; none has INT4 x INT8, and TensorRT refuses most ways of asking for it (docs/quantization.md).

    Requires: nothing.
    Ensures: no layer with a quantized input has a weight in a narrower type than it is multiplied in. Cases:
    1. such a layer (w4a8) with an INT4 constant: widened, and a zero point, where there is one, with it;
    2. a layer whose input is not quantized (w4a16): left alone, unless `weight_only` asks for it (a backend without
       INT4 kernels).
    """

    def __init__(self, weight_only: bool = False) -> None:
        super().__init__()
        self.weight_only = weight_only

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for layer in quantized_layers(model):
            narrow, wide = layer.formats.weight, self._wide(layer.formats)
            if narrow.element == wide.element or (dequantize := layer.weight_dequantize) is None:
                continue
            for value in (dequantize.inputs[0], *dequantize.inputs[2:]):  # the integers and the optional zero point
                if value is None or value.dtype != ir.DataType[narrow.onnx_type]:
                    continue
                retype_constant(value, array_type(wide.array_type))
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for layer in quantized_layers(model):
            dequantize = layer.weight_dequantize
            codes = dequantize.inputs[0] if dequantize is not None else None
            narrow, wide = layer.formats.weight, self._wide(layer.formats)
            if narrow.element != wide.element and codes is not None and codes.dtype == ir.DataType[narrow.onnx_type]:
                raise ir.passes.PostconditionError(
                    f"{layer.name}: its weight is {narrow.title}, {wide.title} was wanted"
                )

    def _wide(self, formats: LayerFormats) -> NumberFormat:
        """What the weight is to be held in."""
        if formats.activation is None and not self.weight_only:
            return formats.weight
        return number_format(f"{formats.weight.multiplied_as}/channel")
