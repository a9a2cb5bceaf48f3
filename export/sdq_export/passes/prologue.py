"""The prologue: what depends on the prompt but not on the latents leaves the denoiser's graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sdq_export.graph import add_input, drop_unused_inputs, module_of, rename
from sdq_export.passes.clean_up import RemoveDeadCode

__all__ = ["CutPrologue", "KeepPrologue", "prologue_names"]

_PARTS = {"to_k": "key", "to_v": "value"}


class KeepPrologue(ir.passes.InPlacePass):
    """Keep the keys and values of the text, for each cross-attention, and what else an earlier pass has put out.

    Requires: the text is read by ``to_k`` and ``to_v`` of attentions only; the graph's first output is the prediction.
    Ensures: the outputs are ``<attention>.key`` and ``<attention>.value`` in graph order, then those that were behind
    the prediction; there are no inputs but the text and `also`.

    Args:
        text_input: the captured graph's name for the text embeddings.
        also: other conditioning that the prologue may read.
        batch: the symbol for the batch size of the prologue, in place of the captured graph's ``2*batch``.
    """

    def __init__(self, text_input: str, also: Sequence[str] = (), batch: str = "batch") -> None:
        super().__init__()
        self.text_input = text_input
        self.also = also
        self.batch = batch

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut in place."""
        graph = model.graph
        projections = _text_projections(model, self.text_input)
        others = list(graph.outputs)[1:]
        graph.outputs.clear()
        for name, node in projections.items():
            rename(node, name)
            graph.outputs.append(node.outputs[0])
        graph.outputs.extend(others)
        RemoveDeadCode()(model)
        drop_unused_inputs(graph, [value.name or "" for value in graph.inputs])
        for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
            if value.shape is not None:
                value.shape = ir.Shape([self._single(dim) for dim in value.shape])
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The text goes where this pass thinks it goes."""
        _text_projections(model, self.text_input)

    def ensures(self, model: ir.Model) -> None:
        """Nothing but conditioning is read."""
        names = [value.name for value in model.graph.inputs]
        if set(names) - {self.text_input, *self.also}:
            raise ir.passes.PostconditionError(f"the prologue's inputs are {names}, conditioning alone is wanted")

    def _single(self, dim: int | ir.SymbolicDim) -> int | str:
        name = _dim(dim)
        return self.batch if name == "2*batch" else name


class CutPrologue(ir.passes.InPlacePass):
    """Take the keys and values of the text as graph inputs, ``<attention>.key`` and ``<attention>.value``.

    Requires: the text is read by ``to_k`` and ``to_v`` of attentions only.
    Ensures: no projection of the text and no text input are left.

    Args:
        text_input: the captured graph's name for the text embeddings.
    """

    def __init__(self, text_input: str) -> None:
        super().__init__()
        self.text_input = text_input

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut in place."""
        graph = model.graph
        for name, node in _text_projections(model, self.text_input).items():
            output = node.outputs[0]
            assert output.shape is not None
            value = add_input(graph, name, ir.DataType.FLOAT, [_dim(dim) for dim in output.shape])
            ir.convenience.replace_all_uses_with(output, value)
        RemoveDeadCode()(model)
        drop_unused_inputs(graph, [self.text_input])
        return ir.passes.PassResult(model, modified=True)

    def requires(self, model: ir.Model) -> None:
        """The text goes where this pass thinks it goes."""
        _text_projections(model, self.text_input)

    def ensures(self, model: ir.Model) -> None:
        """The text is gone."""
        if any(value.name == self.text_input for value in model.graph.inputs):
            raise ir.passes.PostconditionError(f"the denoiser still reads {self.text_input}")


def prologue_names(prologue: ir.Model) -> list[str]:
    """Names of the prologue's outputs, which the denoiser takes as inputs."""
    return [value.name or "" for value in prologue.graph.outputs]


def _text_projections(model: ir.Model, text_input: str) -> dict[str, ir.Node]:
    """``<attention>.key`` or ``.value`` -> the last node of that projection."""
    text = next((value for value in model.graph.inputs if value.name == text_input), None)
    if text is None:
        raise ir.passes.PreconditionError(f"the graph has no input {text_input}")
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        if text not in node.inputs:
            continue
        attention, _, part = (module_of(node) or "").rpartition(".")
        if part not in _PARTS:
            raise ir.passes.PreconditionError(
                f"the text is also read by {node.name}; only keys and values of cross-attention may read it"
            )
        found[f"{attention}.{_PARTS[part]}"] = _last_of_module(node)
    return found


def _last_of_module(node: ir.Node) -> ir.Node:
    """The projection's bias, if it has one, comes after its product."""
    consumers = list(node.outputs[0].consumers())
    if len(consumers) == 1 and module_of(consumers[0]) == module_of(node):
        return _last_of_module(consumers[0])
    return node


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim)
