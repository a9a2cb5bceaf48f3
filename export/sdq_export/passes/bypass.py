"""Activation quantization taken out again, for the parity gate's first criterion."""

from __future__ import annotations

import onnx_ir as ir

from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["BypassActivations"]


class BypassActivations(ir.passes.InPlacePass):
    """Let the consumers of each activation's DequantizeLinear read what its QuantizeLinear read.

    Requires: nothing.
    Ensures: no QuantizeLinear is left; weights stay dequantized constants.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove in place."""
        modified = False
        for node in list(model.graph):
            quantized = node.inputs[0] if node.op_type == "DequantizeLinear" else None
            producer = quantized.producer() if quantized is not None else None
            if producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
                ir.convenience.replace_all_uses_with(node.outputs[0], producer.inputs[0])
                modified = True
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No activation is quantized."""
        if any(node.op_type == "QuantizeLinear" for node in model.graph):
            raise ir.passes.PostconditionError("a QuantizeLinear is left")
