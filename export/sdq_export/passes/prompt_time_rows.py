"""Time information precalculation where the time path is told something of the prompt: the prologue makes the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_export.graph import NodeList, add_input, array_of, constant, drop_unused_inputs, layers_of, rename
from sdq_export.passes.clean_up import RemoveDeadCode
from sdq_export.passes.prompt_rows import activated_rows, read_batch_from_latents, step_row
from sdq_export.passes.time_tables import STEP_INPUT, no_time_path_left, time_addition

__all__ = ["CutTimeRows", "OutputTimeRows"]

_PROJECTION, _ADDED = ".time_emb_proj", "add_embedding.linear_2"


class OutputTimeRows(ir.passes.InPlacePass):
    """Add the time rows of every ResNet block and step to a captured graph's outputs, ``<block>.time_rows``.

    A block adds ``time_emb_proj(silu(emb_t + added))`` to the output of ``conv1``, and ``added`` depends on the prompt
    (SDXL: the pooled embedding and the size). With the table of ``emb_t`` and ``conv1``'s bias folded in,

        time_rows [2*batch, T, C] = silu(table [T, E] + added [2*batch, 1, E]) W^T + (b + conv1.bias)

    Requires: the embedding is added by ``add_embedding``; each block's ``conv1`` is added to its time projection.
    Ensures: the new outputs are behind the prediction.

    Args:
        table: float32 [T, E], ``emb_t`` of each step.
    """

    def __init__(self, table: NDArray[np.float32]) -> None:
        super().__init__()
        self.table = table

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add in place."""
        graph, layers = model.graph, layers_of(model)
        new = NodeList()
        active = activated_rows(graph, new, layers[_ADDED].outputs[0], self.table, "time_rows", "2*batch")
        graph.outputs.extend(self._rows(graph, new, block, layers, active) for block in _blocks(layers))
        graph.extend(new.nodes)
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The time path is where this pass looks for it."""
        layers = layers_of(model)
        if _ADDED not in layers:
            raise ir.passes.PreconditionError(f"the graph has no {_ADDED}")
        for block in _blocks(layers):
            time_addition(block, layers)

    def _rows(
        self, graph: ir.Graph, new: NodeList, block: str, layers: dict[str, ir.Node], active: ir.Value
    ) -> ir.Value:
        projection, convolution = layers[f"{block}{_PROJECTION}"], layers[f"{block}.conv1"]
        weight = array_of(projection.inputs[1])
        if projection.op_type == "Gemm" and _flag(projection, "transB"):
            weight = weight.T
        bias = sum(array_of(node.inputs[2]) for node in (projection, convolution) if len(node.inputs) > 2)
        shape: list[int | str] = ["2*batch", len(self.table), weight.shape[1]]
        stored = constant(graph, f"{block}{_PROJECTION}.weight_transposed", weight)
        product = new.add("MatMul", [active, stored], f"{block}/time_projection", shape=shape)
        added = constant(graph, f"{block}.time_bias", np.asarray(bias, np.float32).reshape(-1))
        return new.add("Add", [product, added], f"{block}.time_rows", shape=shape)


class CutTimeRows(ir.passes.InPlacePass):
    """Take the rows as graph inputs, ``<block>.time_rows`` [2*batch, T, C], and look up the one of the step.

    Requires: each block's ``conv1`` is added to its time projection, and to nothing else (the "default" norm).
    Ensures: no node of the time path is left, nor its inputs.

    Args:
        num_steps: T.
        inputs: the conditioning that the time path alone reads.
        timestep_input: the captured graph's name for the timestep.
    """

    def __init__(self, num_steps: int, inputs: Sequence[str], timestep_input: str = "timestep") -> None:
        super().__init__()
        self.num_steps = num_steps
        self.inputs = (*inputs, timestep_input)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph, layers = model.graph, layers_of(model)
        step = add_input(graph, STEP_INPUT, ir.DataType.INT64, [])
        axes = constant(graph, "time_rows.axes", np.array([2, 3], np.int64))
        for block in _blocks(layers):
            self._replace(graph, block, layers, step, axes)
        read_batch_from_latents(graph)
        RemoveDeadCode()(model)
        drop_unused_inputs(graph, self.inputs)
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """Every block's addition is where this pass looks for it."""
        layers = layers_of(model)
        for block in _blocks(layers):
            time_addition(block, layers)

    def ensures(self, model: ir.Model) -> None:
        """Nothing of the time path is left."""
        no_time_path_left(model, self.inputs)

    def _replace(self, graph: ir.Graph, block: str, layers: dict[str, ir.Node], step: ir.Value, axes: ir.Value) -> None:
        convolution, addition = layers[f"{block}.conv1"], time_addition(block, layers)
        channels = array_of(convolution.inputs[1]).shape[0]
        new = NodeList()
        shape = ("2*batch", self.num_steps, channels)
        row = step_row(graph, new, step, f"{block}.time_rows", f"{block}/time_row", shape)
        spread = new.add("Unsqueeze", [row, axes], f"{block}/time_row_4d", shape=["2*batch", channels, 1, 1])
        graph.insert_before(addition, new.nodes)
        convolution.resize_inputs(2)  # its bias is in the rows
        addition.replace_input_with(0, convolution.outputs[0])
        addition.replace_input_with(1, spread)
        rename(addition, f"{block}/add_time_row")


def _blocks(layers: dict[str, ir.Node]) -> list[str]:
    """Paths of the ResNet blocks, in graph order of their time projections."""
    return [layer.removesuffix(_PROJECTION) for layer in layers if layer.endswith(_PROJECTION)]


def _flag(node: ir.Node, name: str) -> bool:
    attribute: Any = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())
