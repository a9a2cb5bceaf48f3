"""Weights stored as FP16 or BF16 behind a Cast become plain FP32 constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdq_engines.lowering.graph import array_of

__all__ = ["FoldFp16Storage"]


class FoldFp16Storage(ir.passes.InPlacePass):
    """Replace `Cast(FP16 or BF16 constant) -> FP32` by the FP32 constant; exact: all of these are FP32 numbers.

    For engines that would else cast at every call, or that must see a weight to choose its kernel.

    Requires: nothing.
    Ensures: no Cast from an FP16 or BF16 initializer to FP32 is left. Cases:
    1. the constant has this one Cast: the constant is replaced and keeps the Cast's output name;
    2. the constant has other consumers: they keep the stored constant.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not _is_storage_cast(node):
                continue
            stored, output = node.inputs[0], node.outputs[0]
            assert stored is not None
            array = array_of(stored)
            assert array is not None
            tensor = ir.tensor(array.astype(np.float32), name=output.name)
            constant = ir.Value(
                name=output.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
            )
            ir.convenience.replace_all_uses_with(output, constant)
            model.graph.remove(node, safe=True)
            if not stored.uses():  # case 1
                assert stored.name is not None
                del model.graph.initializers[stored.name]
            model.graph.register_initializer(constant)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in model.graph if _is_storage_cast(node)]
        if left:
            raise ir.passes.PostconditionError(f"{len(left)} storage casts are left, the first is {left[0]}")


def _is_storage_cast(node: ir.Node) -> bool:
    if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.FLOAT:
        return False
    source = node.inputs[0]
    if source is None or not source.is_initializer() or node.outputs[0].is_graph_output():
        return False
    return source.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
