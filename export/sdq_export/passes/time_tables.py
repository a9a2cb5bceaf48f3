"""Time information precalculation in the graph: a table of rows in place of the time path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_export.graph import NodeList, add_input, array_of, constant, drop_unused_inputs, layers_of, module_of, rename
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["STEP_INPUT", "TimeTables", "no_time_path_left", "time_addition"]

STEP_INPUT = "step"
_TIME_MODULES = ("time_proj", "time_embedding", "time_emb_proj", "add_time_proj", "add_embedding")


class TimeTables(ir.passes.InPlacePass):
    """Replace the time path by one row per step and ResNet block.

    Time information precalculation, TIP: docs/quantization.md, "Serial-to-parallel training".

    A block with the default time embedding adds ``time_emb_proj(silu(emb_t))`` to the output of ``conv1``. Together
    with ``conv1``'s bias that is one row of C values for each step, looked up by the new graph input ``step``
    (int64 scalar): the projection costs nothing at all, and neither does the bias.

    Requires: each block's ``conv1`` is added to its time projection, and to nothing else (the "default" norm).
    Ensures: no node of the time path and no ``timestep`` input are left.

    Args:
        tables: path of each ResNet block -> float32 [T, C], as `sdq_export.stepping.time_tables` computes them.
        timestep_input: the captured graph's name for the timestep.
    """

    def __init__(self, tables: Mapping[str, NDArray[np.float32]], timestep_input: str = "timestep") -> None:
        super().__init__()
        self.tables = tables
        self.timestep_input = timestep_input

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        layers = layers_of(model)
        step = add_input(model.graph, STEP_INPUT, ir.DataType.INT64, [])
        for block, table in self.tables.items():
            self._replace(model.graph, block, table, layers, step)
        RemoveDeadCode()(model)
        drop_unused_inputs(model.graph, [self.timestep_input])
        return ir.passes.PassResult(model, modified=bool(self.tables))

    def requires(self, model: ir.Model) -> None:
        """Every block's addition is where this pass looks for it."""
        layers = layers_of(model)
        for block in self.tables:
            time_addition(block, layers)

    def ensures(self, model: ir.Model) -> None:
        """Nothing of the time path is left."""
        no_time_path_left(model, [self.timestep_input])

    def _replace(
        self,
        graph: ir.Graph,
        block: str,
        table: NDArray[np.float32],
        layers: Mapping[str, ir.Node],
        step: ir.Value,
    ) -> None:
        convolution, addition = layers[f"{block}.conv1"], time_addition(block, layers)
        rows = table.astype(np.float32)
        if len(convolution.inputs) > 2:
            rows = rows + array_of(convolution.inputs[2])
            convolution.resize_inputs(2)
        new = NodeList()
        channels = int(rows.shape[1])
        stored = constant(graph, f"{block}.time_rows", rows[:, :, None, None])
        row = new.add("Gather", [stored, step], f"{block}/time_row", shape=[channels, 1, 1])
        graph.insert_before(addition, new.nodes)
        addition.replace_input_with(0, convolution.outputs[0])
        addition.replace_input_with(1, row)
        rename(addition, f"{block}/add_time_row")


def no_time_path_left(model: ir.Model, inputs: Sequence[str]) -> None:
    """Check that no node of the time path is left, nor any of its inputs.

    Raises:
        PostconditionError: naming what is.
    """
    left = [node.name for node in model.graph if _is_time_path(module_of(node))]
    left += [value.name for value in model.graph.inputs if value.name in inputs]
    if left:
        raise ir.passes.PostconditionError(f"the time path is still in the graph: {left}")


def time_addition(block: str, layers: Mapping[str, ir.Node]) -> ir.Node:
    """The Add of conv1's output and the projected time embedding.

    Raises:
        PreconditionError: conv1 is read by something else, or something else is added to it.
    """
    convolution, projection = layers[f"{block}.conv1"], layers[f"{block}.time_emb_proj"]
    consumers = list(convolution.outputs[0].consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        raise ir.passes.PreconditionError(
            f"{block}: conv1 is read by {[node.op_type for node in consumers]}, one Add of the time embedding is wanted"
        )
    other = next(value for value in consumers[0].inputs if value is not convolution.outputs[0])
    if _first_layer_before(other) is not projection:
        raise ir.passes.PreconditionError(f"{block}: what is added to conv1 is not {block}.time_emb_proj")
    return consumers[0]


def _first_layer_before(value: Any) -> ir.Node | None:
    """The node behind a value, past operations that only change its shape."""
    node: ir.Node | None = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Unsqueeze", "Reshape"):
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def _is_time_path(module: str | None) -> bool:
    return module is not None and any(part in _TIME_MODULES for part in module.split("."))
