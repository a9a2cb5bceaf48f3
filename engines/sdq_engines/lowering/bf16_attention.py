"""Long self-attention in BF16, on CPUs that multiply BF16 matrices."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from sdq_engines.lowering.graph import cast_node

__all__ = ["LEAST_KEYS", "Bf16Attention"]

#: From how many keys on it pays: below, the products are a small part of a step (docs/benchmarks.md).
LEAST_KEYS = 1024


class Bf16Attention(ir.passes.InPlacePass):
    """Type softmax(Q K') V as BF16 where it has many keys; what comes and goes stays FP32.

    The two products of attention are not quantized, and with thousands of tokens they take longer than all layers
    that are. Engines fuse the region and accumulate and normalize in FP32; what is rounded is Q, K, V and the weights.

    Requires: nothing.
    Ensures: nothing outside the regions has another type. Cases:
    1. MatMul, Softmax, MatMul with at least `least_keys` keys: three casts to BF16 before it, one back after;
    2. fewer keys, a number of keys that is not known, or anything between the three: left alone.

    Args:
        least_keys: of a Softmax's last axis.
    """

    def __init__(self, least_keys: int = LEAST_KEYS) -> None:
        super().__init__()
        self.least_keys = least_keys

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Of a package of free sizes, the passes before leave inner values without a shape.
        if any(node.op_type == "Softmax" and node.outputs[0].shape is None for node in model.graph):
            common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        found = [node for node in model.graph if self._is_long(node)]
        for softmax in found:
            _retype(model.graph, softmax)
        return ir.passes.PassResult(model, modified=bool(found))

    def _is_long(self, node: ir.Node) -> bool:
        if node.op_type != "Softmax" or (shape := node.outputs[0].shape) is None:
            return False
        scores = _producer(node)
        consumers = node.outputs[0].consumers()
        return (
            isinstance(shape[-1], int)
            and shape[-1] >= self.least_keys
            and scores is not None
            and scores.op_type == "MatMul"
            and len(scores.outputs[0].consumers()) == 1
            and [consumer.op_type for consumer in consumers] == ["MatMul"]
            and consumers[0].inputs[0] is node.outputs[0]
        )


def _producer(node: ir.Node) -> ir.Node | None:
    value = node.inputs[0]
    return value.producer() if value is not None else None


def _retype(graph: ir.Graph, softmax: ir.Node) -> None:
    scores, mixed = _producer(softmax), softmax.outputs[0].consumers()[0]
    assert scores is not None
    for node, index in ((scores, 0), (scores, 1), (mixed, 1)):
        value = node.inputs[index]
        assert value is not None
        cast = cast_node(value, ir.DataType.BFLOAT16, f"{node.name}/to_bf16_{index}")
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    for value in (scores.outputs[0], softmax.outputs[0], mixed.outputs[0]):
        value.dtype = ir.DataType.BFLOAT16
    back = cast_node(mixed.outputs[0], ir.DataType.FLOAT, f"{mixed.name}/to_fp32")
    ir.convenience.replace_all_uses_with(mixed.outputs[0], back.outputs[0])
    back.replace_input_with(0, mixed.outputs[0])
    graph.insert_after(mixed, back)
