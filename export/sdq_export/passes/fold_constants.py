"""What follows from constants alone is a constant, where that makes the graph no larger."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir

__all__ = ["FoldConstants"]

# The choice of nodes is this pass's; onnxscript's own limits are for a graph of unknown constants.
_NO_LIMIT = 1 << 62


class FoldConstants(ir.passes.InPlacePass):
    """Compute, once and for all, what reads only constants: an MMDiT's crop of its position table, a T5's buckets.

    The exporter leaves operations on large constants alone, and those of a skeleton (`sdq_export.skeleton`) have values
    only since `AssignWeights`. Looking from the end of a constant computation to its beginning, its cases are:
    1. the result takes no more bytes than the constants that nothing else reads, nor does any value on the way: folded;
    2. it would leave more bytes than before (a broadcast, a lookup), or a size is not known: stays, and a shorter part
       of it is tried.

    Requires: every constant has its values.
    Ensures: the constants together take no more bytes; nothing of case 1 is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place."""
        before, nodes = _bytes_of_constants(model.graph), _to_fold(model.graph)
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        # a branch that a Where discards may take the logarithm of 0
        with np.errstate(divide="ignore", invalid="ignore"):
            fold_constants_ir(
                model, should_fold=nodes.__contains__, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT
            )
        assert _bytes_of_constants(model.graph) <= before
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left to fold."""
        if left := _to_fold(model.graph):
            raise ir.passes.PostconditionError(f"{min(node.name or '' for node in left)} was not folded")


def _to_fold(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of case 1."""
    computed: dict[ir.Node, set[ir.Node]] = {}  # node that reads constants alone -> it and those before it
    for node in graph:
        producers = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
        if len(node.outputs) == 1 and node.inputs and all(producer in computed for producer in producers):
            computed[node] = {node}.union(*(computed[producer] for producer in producers if producer is not None))
    found: set[ir.Node] = set()
    for node, before in reversed(computed.items()):
        if node not in found and not node.outputs[0].is_graph_output() and _shrinks(node, before):
            found |= before
    return found


def _shrinks(last: ir.Node, nodes: set[ir.Node]) -> bool:
    """Whether the constant that `last` makes, and all on the way to it, take no more bytes than what `nodes` read."""
    sizes = [_size(node.outputs[0]) for node in nodes]
    gone = _only_for(last, nodes)
    read = {value for node in gone for value in node.inputs if value is not None and value.is_initializer()}
    freed = sum(
        value.const_value.nbytes
        for value in read
        if value.const_value is not None and gone.issuperset(value.consumers()) and not value.is_graph_output()
    )
    return all(size is not None and size <= freed for size in sizes)


def _only_for(last: ir.Node, nodes: set[ir.Node]) -> set[ir.Node]:
    """Those of `nodes` that nothing needs any more once the output of `last` is known."""
    gone = {last}
    while more := {node for node in nodes - gone if gone.issuperset(node.outputs[0].consumers())}:
        gone |= more
    return gone


def _size(value: ir.Value) -> int | None:
    if value.dtype is None or value.shape is None or not value.shape.is_static():
        return None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _bytes_of_constants(graph: ir.Graph) -> int:
    return sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
