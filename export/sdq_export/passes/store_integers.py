"""Weights stored as INT8 or INT4 behind a DequantizeLinear: weight-only, the product is computed in floating point."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from sdq_engines.formats import INT4, INT8
from sdq_engines.lowering.graph import array_type
from sdq_export.graph import NodeList, array_of, constant, layers_of
from sdq_export.integer_storage import as_integers, block_of
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["StoreIntegers"]

_WEIGHT_INPUT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


class StoreIntegers(ir.passes.InPlacePass):
    """Put weights that `sdq_export.integer_storage` has rounded behind a DequantizeLinear of their integers.

    The graph computes the same in FP32 as before, bit for bit. Cases:
    1. a matrix of a linear layer, rounded to INT4 in blocks: an INT4 constant, which ONNX stores packed;
    2. a weight rounded to INT8: one scale per output channel, of an embedding per row;
    3. any other weight stays.

    Requires: nothing.
    Ensures: nothing changed but the storage.

    Args:
        layers: paths of the layers to look at; None for all, and the embeddings.
    """

    def __init__(self, layers: Collection[str] | None = None) -> None:
        super().__init__()
        self.layers = None if layers is None else set(layers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store in place."""
        stored: dict[ir.Value, ir.Value | None] = {}
        for node, weight in list(self._weights(model)):
            if weight not in stored:
                stored[weight] = _store(model.graph, node, weight)
            if (integers := stored[weight]) is not None:
                node.replace_input_with(_WEIGHT_INPUT[node.op_type], integers)
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=any(value is not None for value in stored.values()))

    def _weights(self, model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
        if self.layers is not None:
            chosen = [node for layer, node in layers_of(model).items() if layer in self.layers]
        else:
            chosen = [node for node in model.graph if node.op_type in _WEIGHT_INPUT]
        for node in chosen:
            weight = node.inputs[_WEIGHT_INPUT[node.op_type]]
            if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.FLOAT:
                continue
            if weight.shape is not None and len(weight.shape) >= 2:
                yield node, weight


def _store(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value | None:
    """What is read in the weight's place, made before the node; None in case 3."""
    array, axis = array_of(weight), _channel_axis(node)
    attributes, format = {"axis": axis}, INT8
    found = None
    if node.op_type in ("MatMul", "Gemm") and array.ndim == 2 and (block := block_of(array.shape[1 - axis])):  # case 1
        found = as_integers(array, axis, block)
        if found is not None:
            attributes, format = {"axis": 1 - axis, "block_size": block}, INT4.in_blocks(block)
    found = found or as_integers(array, axis)
    if found is None:
        return None
    integers, scale = found
    name = (weight.name or "").removesuffix(".weight")
    new = NodeList()
    value = new.add(
        "DequantizeLinear",
        [
            constant(
                graph, f"{name}.weight.{format.element}", integers.astype(array_type(format.array_type), copy=False)
            ),
            constant(graph, f"{name}.weight_scale", scale),
        ],
        f"{name}/weight_dequantize",
        dtype=ir.DataType.FLOAT,
        shape=weight.shape,
        attributes=attributes,
    )
    graph.insert_before(next(iter(graph)), new.nodes)
    return value


def _channel_axis(node: ir.Node) -> int:
    """Of the weight's output channels."""
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    return 1 if node.op_type == "MatMul" else 0
