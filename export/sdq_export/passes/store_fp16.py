"""Large float weights stored as FP16, or as BF16 where they are that: half the file, the same numbers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_export.graph import NodeList, array_of, constant
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["StoreFp16"]

_FORMS: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_WEIGHT_INPUT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


class StoreFp16(ir.passes.InPlacePass):
    """Put the weights of Conv, MatMul, Gemm and embedding Gather behind a Cast from FP16 or BF16.

    The graph computes the same in FP32 as before, bit for bit. Norms, biases, scales and tables stay FP32. Cases:
    1. a weight of FP16 numbers (`sdq_export.storage.round_weights_`): FP16, which engines compute in;
    2. one of BF16 numbers that are beyond FP16's range, or too small for its precision: BF16;
    3. any other: as it is.

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
        found = _sixteen_bits(array_of(weight))
        if found is None:
            return False
        form, half = found
        name = weight.name or ""
        new = NodeList()
        first = next(iter(graph))
        value = new.add(
            "Cast",
            [constant(graph, f"{name}.{form}", half)],
            f"{name}/cast",
            dtype=ir.DataType.FLOAT,
            shape=weight.shape,
            attributes={"to": ir.DataType.FLOAT},
        )
        graph.insert_before(first, new.nodes)
        ir.convenience.replace_all_uses_with(weight, value)
        return True


def _sixteen_bits(array: NDArray[Any]) -> tuple[str, NDArray[Any]] | None:
    """The form that holds these numbers exactly, and the numbers in it."""
    for form, dtype in _FORMS.items():
        with np.errstate(over="ignore"):
            half = array.astype(dtype)
        if np.array_equal(half.astype(np.float32), array):
            return form, half
    return None


def _weight(node: ir.Node) -> ir.Value | None:
    index = _WEIGHT_INPUT.get(node.op_type)
    value = node.inputs[index] if index is not None and len(node.inputs) > index else None
    if value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT or value.shape is None:
        return None
    return value if len(value.shape) >= 2 else None
