"""Readable names: every node and value after the module that made it."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from sdq_export.graph import layers_of, module_of

__all__ = ["NameNodes"]


class NameNodes(ir.passes.InPlacePass):
    """Name nodes ``<module>/<operator>``, so that Netron, builders' logs and our reports speak of the same layers.

    Cases:
    1. a node of a module: ``<module>/<operator>``, numbered when the module has several;
    2. a node that the exporter left unmarked: the module of the node it reads from;
    3. a weight that the exporter folded into a nameless constant: ``<layer>.weight``;
    4. any other nameless constant: ``constant_<n>``.

    Requires: nothing.
    Ensures: no two nodes share a name.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place; inputs and outputs of the graph keep their names."""
        seen: Counter[str] = Counter()
        outputs = set(model.graph.outputs)
        for node in model.graph:
            base = f"{_module_near(node)}/{node.op_type}".lstrip("/")
            seen[base] += 1
            node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
            for index, value in enumerate(node.outputs):
                if value not in outputs:
                    value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
        self._name_constants(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No two nodes share a name."""
        names = [node.name for node in model.graph]
        if len(set(names)) != len(names):
            raise ir.passes.PostconditionError("two nodes share a name")

    def _name_constants(self, model: ir.Model) -> None:
        for layer, node in layers_of(model).items():
            weight = node.inputs[1]
            # A constant with a dot in its name kept the name of its parameter.
            if weight is not None and "." not in (weight.name or "") and len(weight.uses()) == 1:
                weight.name = f"{layer}.weight"  # case 3
        count = 0
        for value in list(model.graph.initializers.values()):
            if "." not in (value.name or ""):
                value.name = f"constant_{count}"  # case 4
                count += 1


def _module_near(node: ir.Node) -> str:
    """The node's module, or the module of the closest node before it that has one."""
    module = module_of(node)
    while module is None:
        producers = [value.producer() for value in node.inputs if value is not None]
        before = next((producer for producer in producers if producer is not None), None)
        if before is None:
            return ""
        node, module = before, module_of(before)
    return module
