"""Scales of one element become scalars, so that a builder sees one scale per tensor and not one per channel."""

from __future__ import annotations

import onnx_ir as ir

from sdq_engines.lowering.graph import array_of, replace_constant

__all__ = ["ScalarScales"]


class ScalarScales(ir.passes.InPlacePass):
    """Reshape Q/DQ scales and zero points of shape [1] to scalars; ONNX means the same by both where no axis is 1 long.

    TensorRT takes a scale of shape [1] for a per-channel one: it still builds, but the convolution behind it silently
    falls back to FP16 (measured on TensorRT-RTX 1.7.1; the kernel counts show it).

    Requires: nothing.
    Ensures: no QuantizeLinear or DequantizeLinear without blocks has a one-element scale with a dimension, unless it
    is the scale of a tensor whose quantized axis has length one.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or "block_size" in node.attributes:
                continue
            quantized = node.inputs[0]
            if quantized is not None and quantized.is_initializer():
                continue  # a weight: per channel, whatever the number of channels
            for value in node.inputs[1:]:
                array = array_of(value)
                if value is not None and array is not None and array.shape == (1,):
                    replace_constant(value, array.reshape(()))
                    modified = True
        return ir.passes.PassResult(model, modified=modified)
