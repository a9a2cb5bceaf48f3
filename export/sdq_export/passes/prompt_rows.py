"""What the passes share that move a time path to the prologue because the prompt has a part in it.

Such a path computes something of silu(embedded step + embedded prompt). The prologue computes it for all T steps, the
denoiser looks its step's row up.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_export.graph import NodeList, add_input, constant

__all__ = ["activated_rows", "read_batch_from_latents", "step_row"]

_LATENTS = "sample"
"""The captured graph's name for the latents."""


def activated_rows(
    graph: ir.Graph, new: NodeList, prompt: ir.Value, table: NDArray[np.float32], name: str, batch: str
) -> ir.Value:
    """Add silu(table [T, E] + prompt [batch, 1, E]), [batch, T, E].

    Args:
        graph: gets the constants.
        new: gets the nodes.
        prompt: the embedded prompt, [batch, E].
        table: the embedded steps.
        name: begins the names of what is added.
        batch: the symbol of its size.
    """
    steps, width = table.shape
    axis = constant(graph, f"{name}.axis", np.array([1], np.int64))
    stored = constant(graph, f"{name}.table", np.asarray(table, np.float32))
    column = new.add("Unsqueeze", [prompt, axis], f"{name}/prompt", shape=[batch, 1, width])
    rows = new.add("Add", [column, stored], f"{name}/rows", shape=[batch, steps, width])
    gate = new.add("Sigmoid", [rows], f"{name}/sigmoid")
    return new.add("Mul", [rows, gate], f"{name}/silu")


def step_row(
    graph: ir.Graph, new: NodeList, step: ir.Value, rows: str, name: str, shape: tuple[str, int, int]
) -> ir.Value:
    """Take rows as a graph input and look up that of the step, [batch, C].

    Args:
        graph: gets the input.
        new: gets the node.
        step: int64 [].
        rows: name of the input.
        name: of the row.
        shape: batch, T and C of the input.
    """
    batch, _, width = shape
    value = add_input(graph, rows, ir.DataType.FLOAT, shape)
    return new.add("Gather", [value, step], name, shape=[batch, width], attributes={"axis": 1})


def read_batch_from_latents(graph: ir.Graph) -> None:
    """A graph of free size asks an input for the batch's length, perhaps one that is cut away: ask the latents."""
    latents = next(value for value in graph.inputs if value.name == _LATENTS)
    for node in graph:
        if node.op_type != "Shape" or node.inputs[0] not in graph.inputs:
            continue
        if (node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)) == (0, 1):
            node.replace_input_with(0, latents)
