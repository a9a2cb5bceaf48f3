"""Which part of a whole-step graph is the sampler's arithmetic, found by what lies between weights."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["STATE_INPUTS", "constant_values", "sampler_nodes"]

#: Inputs of the denoiser that belong to the sampler (docs/package-format.md).
STATE_INPUTS = frozenset({"latents", "history", "noise", "guidance_scale", "coefficients", "extra_channels"})

_ALWAYS_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm"})


def sampler_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute the model's input from the state, and the new state from the model's output.

    A node belongs to the sampler if it depends on a state input and does not lie on a path from one weighted operator
    (a Conv, a Gemm, a MatMul with a constant operand) to another: before the first, or after the last.
    """
    nodes = list(model.graph)
    constant = constant_values(nodes)
    weighted = [node for node in nodes if _is_weighted(node, constant)]
    after = _downstream(nodes, (output for node in weighted for output in node.outputs))
    before = _upstream(nodes, weighted)
    stateful = _downstream(nodes, (value for value in model.graph.inputs if value.name in STATE_INPUTS))
    return {node for node in stateful if node not in weighted and not (node in after and node in before)}


def constant_values(nodes: list[ir.Node]) -> set[ir.Value]:
    """Outputs computed from initializers alone, e.g. a dequantized weight."""
    constant: set[ir.Value] = set()
    for node in nodes:
        if all(value is None or value.is_initializer() or value in constant for value in node.inputs):
            constant.update(node.outputs)
    return constant


def _is_weighted(node: ir.Node, constant: set[ir.Value]) -> bool:
    if node.op_type in _ALWAYS_WEIGHTED:
        return True
    return node.op_type == "MatMul" and any(
        value is not None and (value.is_initializer() or value in constant) for value in node.inputs
    )


def _downstream(nodes: list[ir.Node], values: Iterable[ir.Value]) -> set[ir.Node]:
    reached, found = set(values), set()
    for node in nodes:  # in topological order, so one sweep reaches all
        if any(value in reached for value in node.inputs):
            found.add(node)
            reached.update(node.outputs)
    return found


def _upstream(nodes: list[ir.Node], targets: list[ir.Node]) -> set[ir.Node]:
    wanted = {value for node in targets for value in node.inputs}
    found = set()
    for node in reversed(nodes):
        if any(output in wanted for output in node.outputs):
            found.add(node)
            wanted.update(node.inputs)
    return found
