"""Adaptive normalization computed once per prompt: the modulation of every step leaves an MMDiT's graph.

Time information precalculation, TIP: docs/quantization.md, "Serial-to-parallel training". In an MMDiT (Esser et al.,
"Scaling Rectified Flow Transformers", 2024, section 4) each adaptive normalization scales, shifts and gates by

    linear( silu( timestep_embedder(t) + text_embedder(pooled) ) )

which depends on the step and on the prompt, not on the latents. The prologue computes it for all T steps, the denoiser
looks its step's row up; the projection of the text, the same at every step, moves with it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_export.graph import (
    NodeList,
    add_input,
    constant,
    drop_unused_inputs,
    layers_of,
    module_of,
    rename,
)
from sdq_export.passes.clean_up import RemoveDeadCode
from sdq_export.passes.prompt_rows import activated_rows, read_batch_from_latents, step_row
from sdq_export.passes.time_tables import STEP_INPUT

__all__ = ["CONTEXT", "CutModulation", "KeepModulation"]

CONTEXT = "context"
"""The projected text, f32 [batch, L, C]: an output of the prologue, an input of the denoiser."""

_CONTEXT_LAYER = "context_embedder"
_TIME_TEXT = "time_text_embed"
_TEXT_LAYER = f"{_TIME_TEXT}.text_embedder.linear_2"
_ROWS = "batch*steps"
_LINEAR, _MODULATION = ".linear", ".modulation"


class KeepModulation(ir.passes.InPlacePass):
    """Keep what depends on the prompt and on the table of steps: the projected text, and all modulations.

    Requires: `NameNodes` has run; every adaptive normalization is a ``linear`` that reads one silu of the sum of the
    embedded timestep and the embedded pooled text.
    Ensures: the outputs are ``context`` [batch, L, C] and, in graph order, ``<norm>.modulation`` [batch, T, k*C]; no
    timestep is among the inputs.

    Args:
        table: float32 [T, C], ``timestep_embedder`` of each step.
        batch: the symbol for the batch size of the prologue.
    """

    def __init__(self, table: NDArray[np.float32], batch: str = "batch") -> None:
        super().__init__()
        self.table = table
        self.batch = batch

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut in place."""
        graph = model.graph
        context, norms = _context(model), _modulations(model)
        steps = len(self.table)
        rows = self._activated_rows(graph, layers_of(model)[_TEXT_LAYER].outputs[0], next(iter(norms.values())))
        graph.outputs.clear()
        rename(context, CONTEXT)
        graph.outputs.append(context.outputs[0])
        for name, linear in norms.items():
            linear.replace_input_with(0, rows)
            graph.outputs.append(self._per_step(graph, linear, name, steps))
        RemoveDeadCode()(model)
        drop_unused_inputs(graph, [value.name or "" for value in graph.inputs])
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            if value.shape is not None:
                value.shape = ir.Shape([self._dim(dim) for dim in value.shape])
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The modulations are where this pass looks for them."""
        _context(model)
        _modulations(model)

    def ensures(self, model: ir.Model) -> None:
        """Nothing waits for a timestep or for latents."""
        left = {value.name for value in model.graph.inputs} & {"timestep", "sample"}
        if left:
            raise ir.passes.PostconditionError(f"the prologue still reads {', '.join(sorted(filter(None, left)))}")

    def _dim(self, dim: int | ir.SymbolicDim) -> int | str:
        """The captured graph's batch is the denoiser's, of twice as many."""
        return dim if isinstance(dim, int) else _ROWS if str(dim) == _ROWS else self.batch

    def _activated_rows(self, graph: ir.Graph, text: ir.Value, first: ir.Node) -> ir.Value:
        """silu(table[t] + text) of every step, [batch * T, C]."""
        new, channels = NodeList(), self.table.shape[1]
        rows = activated_rows(graph, new, text, self.table, _TIME_TEXT, self.batch)
        flat = constant(graph, "modulation.flat", np.array([-1, channels], np.int64))
        value = new.add("Reshape", [rows, flat], f"{_TIME_TEXT}/flat_rows", shape=[_ROWS, channels])
        graph.insert_before(first, new.nodes)
        return value

    def _per_step(self, graph: ir.Graph, linear: ir.Node, name: str, steps: int) -> ir.Value:
        """A layer's output [batch * T, k*C] as [batch, T, k*C]."""
        width = _width(linear)
        new = NodeList()
        shape = constant(graph, f"modulation.per_step_{width}", np.array([-1, steps, width], np.int64))
        linear.outputs[0].shape = ir.Shape([_ROWS, width])
        value = new.add("Reshape", [linear.outputs[0], shape], name, shape=[self.batch, steps, width])
        graph.insert_after(linear, new.nodes)
        return value


class CutModulation(ir.passes.InPlacePass):
    """Take the projected text and the modulations as graph inputs, and look the step's row up.

    Requires: as `KeepModulation`.
    Ensures: new inputs ``step`` (int64 scalar), ``context`` and ``<norm>.modulation`` [2*batch, T, k*C]; nothing of
    the time path, of the projection of the text or of their inputs is left.

    Args:
        steps: T.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut in place."""
        graph = model.graph
        context, norms = _context(model), _modulations(model)
        step = add_input(graph, STEP_INPUT, ir.DataType.INT64, [])
        _replace_by_input(graph, context, CONTEXT)
        read_batch_from_latents(graph)
        for name, linear in norms.items():
            new, shape = NodeList(), (_batch(linear), self.steps, _width(linear))
            row = step_row(graph, new, step, name, f"{name}_row", shape)
            graph.insert_after(linear, new.nodes)
            ir.convenience.replace_all_uses_with(linear.outputs[0], row)
        RemoveDeadCode()(model)
        drop_unused_inputs(graph, [value.name or "" for value in graph.inputs if value is not step])
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The modulations are where this pass looks for them."""
        _context(model)
        _modulations(model)

    def ensures(self, model: ir.Model) -> None:
        """Nothing that is precomputed is left."""
        left = [
            node.name for node in model.graph if (module_of(node) or "").split(".")[0] in (_TIME_TEXT, _CONTEXT_LAYER)
        ]
        if left:
            raise ir.passes.PostconditionError(f"the denoiser still computes {left[0]}")


def _replace_by_input(graph: ir.Graph, node: ir.Node, name: str) -> None:
    output = node.outputs[0]
    assert output.shape is not None
    value = add_input(
        graph, name, ir.DataType.FLOAT, [dim if isinstance(dim, int) else str(dim) for dim in output.shape]
    )
    ir.convenience.replace_all_uses_with(output, value)


def _context(model: ir.Model) -> ir.Node:
    """The last node of the projection of the text: its bias, or its product where it has none."""
    layers = layers_of(model)
    if _CONTEXT_LAYER not in layers:
        raise ir.passes.PreconditionError(f"the graph has no layer {_CONTEXT_LAYER}")
    node = layers[_CONTEXT_LAYER]
    consumers = list(node.outputs[0].consumers())
    is_bias = len(consumers) == 1 and module_of(consumers[0]) == _CONTEXT_LAYER
    return consumers[0] if is_bias else node


def _modulations(model: ir.Model) -> dict[str, ir.Node]:
    """``<norm>.modulation`` -> the Gemm of the normalization's ``linear``, in graph order."""
    layers = layers_of(model)
    for layer in (_TEXT_LAYER, f"{_TIME_TEXT}.timestep_embedder.linear_2"):
        if layer not in layers:
            raise ir.passes.PreconditionError(f"the graph has no layer {layer}")
    found = {}
    for layer, node in layers.items():
        if not layer.endswith(_LINEAR) or layer.startswith(_TIME_TEXT):
            continue
        if not _reads_silu_of_time(node):
            raise ir.passes.PreconditionError(f"{layer} does not read silu(timestep + text)")
        found[layer.removesuffix(_LINEAR) + _MODULATION] = node
    if not found:
        raise ir.passes.PreconditionError("the graph has no adaptive normalization")
    return found


def _reads_silu_of_time(linear: ir.Node) -> bool:
    """Whether the node reads x * sigmoid(x) of the sum that ``time_text_embed`` makes."""
    silu = linear.inputs[0].producer() if linear.inputs[0] is not None else None
    if linear.op_type != "Gemm" or silu is None or silu.op_type != "Mul":
        return False
    return any(
        value is not None and (maker := value.producer()) is not None and module_of(maker) == _TIME_TEXT
        for value in silu.inputs
    )


def _width(linear: ir.Node) -> int:
    """k*C, what a modulation's last axis holds."""
    shape = linear.outputs[0].shape
    assert shape is not None
    width = shape[-1]
    assert isinstance(width, int)
    return width


def _batch(linear: ir.Node) -> str:
    shape = linear.outputs[0].shape
    assert shape is not None
    return str(shape[0])
