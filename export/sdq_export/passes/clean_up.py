"""The last words of every pass list: dead code, unused constants, the exporter's notes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["ClearNotes", "RemoveDeadCode"]

_KEPT = "sdq."


class RemoveDeadCode(ir.passes.InPlacePass):
    """Remove nodes and constants that no output depends on.

    Requires: nothing.
    Ensures: every node and constant is used.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove in place."""
        before = len(model.graph) + len(model.graph.initializers)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=len(model.graph) + len(model.graph.initializers) != before)


class ClearNotes(ir.passes.InPlacePass):
    """Remove the exporter's metadata (stack traces, scopes), which is larger than a small model; ours stays.

    Requires: no later pass looks for modules.
    Ensures: the only metadata left is named ``sdq.*``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clear in place."""
        for node in model.graph:
            _clear(node.metadata_props)
            node.doc_string = None
            for value in node.outputs:
                _clear(value.metadata_props)
        for value in [*model.graph.inputs, *model.graph.initializers.values()]:
            _clear(value.metadata_props)
        _clear(model.metadata_props)
        _clear(model.graph.metadata_props)
        model.doc_string = model.graph.doc_string = None
        return ir.passes.PassResult(model, modified=True)


def _clear(metadata: dict[str, str]) -> None:
    for key in [key for key in metadata if not key.startswith(_KEPT)]:
        del metadata[key]
