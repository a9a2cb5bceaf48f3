"""Write a lowered graph, with its weights beside it where one file would be too large for protobuf."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

__all__ = ["save_graph"]

#: Protobuf takes 2 GiB; the rest is left for the graph itself.
_INLINE_BYTES = 1 << 30


def save_graph(model: ir.Model, folder: Path) -> Path:
    """Write `model.onnx` (and `model.onnx.data`) into `folder`; returns the path of the graph."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights > _INLINE_BYTES:
        ir.save(model, path, external_data="model.onnx.data")
    else:
        # Weights of a graph that was read from several files would stay references to a file that is not in `folder`.
        ir.save(ir.external_data.load_to_model(model), path)
    return path
