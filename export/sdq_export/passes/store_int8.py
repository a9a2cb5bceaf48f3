"""Weights stored as INT8 behind a DequantizeLinear: weight-only, the product is computed in floating point."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from sdq_export.graph import NodeList, array_of, constant, layers_of
from sdq_export.int8_storage import as_integers
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["StoreInt8"]


class StoreInt8(ir.passes.InPlacePass):
    """Put the weights of some layers, rounded by `sdq_export.int8_storage`, behind a DequantizeLinear from INT8.

    The graph computes the same in FP32 as before, bit for bit.

    Requires: nothing.
    Ensures: nothing changed but the storage.

    Args:
        layers: paths; those that the graph does not have, or whose weights are not rounded, stay.
    """

    def __init__(self, layers: Collection[str]) -> None:
        super().__init__()
        self.layers = set(layers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store in place."""
        nodes = [(layer, node) for layer, node in layers_of(model).items() if layer in self.layers]
        stored = [layer for layer, node in nodes if self._store(model.graph, layer, node)]
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=bool(stored))

    def _store(self, graph: ir.Graph, layer: str, node: ir.Node) -> bool:
        transposed = node.attributes.get("transB")
        axis = 0 if node.op_type == "Gemm" and transposed is not None and transposed.as_int() else 1
        found = as_integers(array_of(node.inputs[1]), axis)
        if found is None:
            return False
        integers, scale = found
        new = NodeList()
        weight = new.add(
            "DequantizeLinear",
            [constant(graph, f"{layer}.weight.int8", integers), constant(graph, f"{layer}.weight_scale", scale)],
            f"{layer}/weight_dequantize",
            dtype=ir.DataType.FLOAT,
            attributes={"axis": axis},
        )
        graph.insert_before(node, new.nodes)
        node.replace_input_with(1, weight)
        return True
