"""Other weights for a captured graph: one capture serves the floating-point model and every quantized one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from sdq_engines.lowering.graph import replace_constant
from sdq_export.graph import layers_of

__all__ = ["AssignWeights"]


class AssignWeights(ir.passes.InPlacePass):
    """Give every parameter of the graph the value that a torch state has for it.

    Cases:
    1. the weight of a MatMul, which the exporter transposed: found by its layer, a transposed view of the state's;
    2. any other parameter: found by its torch name, which the exporter keeps.

    Requires: `NameNodes` has run.
    Ensures: nothing but values changed.

    Args:
        state: torch parameter name -> float32 array; names that the graph does not have are the time path's.
    """

    def __init__(self, state: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.state = state

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Assign in place."""
        transposed = {
            node.inputs[1].name for node in layers_of(model).values() if node.op_type == "MatMul" and node.inputs[1]
        }
        found = [(name, value) for name, value in model.graph.initializers.items() if name in self.state]
        for name, value in found:
            replace_constant(value, self.state[name].T if name in transposed else self.state[name])
        return ir.passes.PassResult(model, modified=bool(found))

    def requires(self, model: ir.Model) -> None:
        """Every parameter in the graph has the shape that the state has for it."""
        missing = [layer for layer in layers_of(model) if f"{layer}.weight" not in model.graph.initializers]
        if missing:
            raise ir.passes.PreconditionError(f"the weight of {missing[0]} has lost its name")
