"""Free dimensions of a graph become numbers, for an engine that is compiled for one size."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["FixDims"]


class FixDims(ir.passes.InPlacePass):
    """Write the sizes of named dimensions into the shapes of all values.

    Engines then fold the graph's shape arithmetic and compile as they do for a graph of one size.

    Requires: nothing.
    Ensures: no input has a dimension of one of the names. Cases:
    1. a dimension that is such a name: its number;
    2. a multiple or a fraction of one (``8*height``, ``width/2``): computed;
    3. any other expression of an inner value: its shape is dropped, which engines infer again.

    Args:
        sizes: name -> extent.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
            if value.shape is None or value.shape.is_static():
                continue
            dims = [dim if isinstance(dim, int) else self._dim(str(dim.value)) for dim in value.shape]
            modified |= dims != [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            value.shape = ir.Shape([dim for dim in dims if dim is not None]) if None not in dims else None
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            names = {str(dim.value) for dim in value.shape or () if not isinstance(dim, int)}
            if left := names & self.sizes.keys():
                raise ir.passes.PostconditionError(f"{value.name} still has {sorted(left)}")

    def _dim(self, name: str) -> int | str | None:
        found = re.fullmatch(r"(?:(\d+)\*)?(\w+?)(?:/(\d+))?", name.replace(" ", ""))
        if found is None:
            return None
        if found[2] not in self.sizes:
            return name
        return int(found[1] or 1) * self.sizes[found[2]] // int(found[3] or 1)
