"""Large float weights stored as FP16: half the file, the same numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sdq_export.graph import NodeList, array_of, constant
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["StoreFp16"]

_WEIGHT_INPUT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


class StoreFp16(ir.passes.InPlacePass):
    """Put the weights of Conv, MatMul, Gemm and embedding Gather behind a Cast from FP16.

    Only weights that are FP16 numbers already (`sdq_export.storage.round_weights`) are stored so; the graph computes
    the same in FP32 as before, bit for bit. Norms, biases, scales and tables stay FP32.

    Requires: nothing.
    Ensures: nothing changed but the storage.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store in place."""
        weights = {id(weight): weight for node in model.graph if (weight := _weight(node)) is not None}
        stored = [weight for weight in weights.values() if self._store(model.graph, weight)]
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=bool(stored))

    def _store(self, graph: ir.Graph, weight: ir.Value) -> bool:
        array = array_of(weight)
        half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            return False
        name = weight.name or ""
        new = NodeList()
        first = next(iter(graph))
        value = new.add(
            "Cast",
            [constant(graph, f"{name}.fp16", half)],
            f"{name}/cast",
            dtype=ir.DataType.FLOAT,
            shape=weight.shape,
            attributes={"to": ir.DataType.FLOAT},
        )
        graph.insert_before(first, new.nodes)
        ir.convenience.replace_all_uses_with(weight, value)
        return True


def _weight(node: ir.Node) -> ir.Value | None:
    index = _WEIGHT_INPUT.get(node.op_type)
    value = node.inputs[index] if index is not None and len(node.inputs) > index else None
    if value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT or value.shape is None:
        return None
    return value if len(value.shape) >= 2 else None
