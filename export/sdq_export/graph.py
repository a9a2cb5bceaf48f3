"""What every pass asks of a captured graph: which module a node belongs to, and small nodes and constants to add."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "NAME_SCOPES",
    "NodeList",
    "add_input",
    "array_of",
    "constant",
    "drop_unused_inputs",
    "insert_after",
    "layers_of",
    "module_of",
    "rename",
]

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_LAYER_OPS = ("Conv", "MatMul", "Gemm")


def module_of(node: ir.Node) -> str | None:
    """Path of the torch module whose forward made this node, as the exporter's ``name_scopes`` metadata says.

    The last scope is the operation itself, the one before it the module; None for a node that the exporter's
    optimizer made and left unmarked.
    """
    scopes = node.metadata_props.get(NAME_SCOPES)
    if scopes is None:
        return None
    path: list[str] = ast.literal_eval(scopes)
    return path[-2] if len(path) >= 2 else ""


def layers_of(model: ir.Model) -> dict[str, ir.Node]:
    """Path of each Conv2d and Linear -> its Conv, MatMul or Gemm, the node whose second input is its weight."""
    found: dict[str, ir.Node] = {}
    for node in model.graph:
        module = module_of(node)
        if module and node.op_type in _LAYER_OPS and node.inputs[1] is not None and node.inputs[1].is_initializer():
            found[module] = node
    return found


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """The array of a constant.

    Raises:
        ValueError: the value is not a constant.
    """
    if value is None or value.const_value is None:
        raise ValueError(f"{value} is not a constant")
    array: NDArray[Any] = value.const_value.numpy()
    return array


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Add an initializer to the graph; the array is not copied, a transposed view is written in its own order.

    Raises:
        ValueError: there is another constant of this name.
    """
    tensor = ir.tensor(array, name=name)
    if name in graph.initializers:
        if np.array_equal(array_of(graph.initializers[name]), array):
            return graph.initializers[name]
        raise ValueError(f"the graph already has another constant {name}")
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Append a graph input."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def insert_after(graph: ir.Graph, node: ir.Node, new: NodeList) -> None:
    """Put nodes behind ``node``: what read its output reads the output of the last of them, a graph output included."""
    before, after = node.outputs[0], new.nodes[-1].outputs[0]
    own = set(new.nodes)
    outside = [use for use in before.uses() if use.node not in own]
    graph.insert_after(node, new.nodes)
    for use in outside:
        use.node.replace_input_with(use.idx, after)
    for index, value in enumerate(graph.outputs):
        if value is before:
            graph.outputs[index] = after
            after.name, before.name = before.name, node.name


def rename(node: ir.Node, name: str) -> None:
    """Name a node, and its output after it."""
    node.name = name
    node.outputs[0].name = name


def drop_unused_inputs(graph: ir.Graph, names: Iterable[str]) -> None:
    """Remove those of the named graph inputs that nothing reads any more."""
    wanted = set(names)
    for value in [value for value in graph.inputs if value.name in wanted and not value.uses()]:
        graph.inputs.remove(value)


class NodeList:
    """Nodes made one after the other, to be inserted into a graph together.

    A node and its output carry the same name.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | Sequence[int | str] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Make a node of one output; dtype and shape default to those of the first input."""
        first = inputs[0]
        assert first is not None
        output = ir.Value(
            name=name,
            type=ir.TensorType(dtype) if dtype is not None else first.type,
            shape=first.shape if shape is None else shape if isinstance(shape, ir.Shape) else ir.Shape(shape),
        )
        self.nodes.append(ir.node(op_type, inputs, attributes or {}, outputs=[output], name=name))
        return output

    def split(self, value: ir.Value, names: Sequence[str], shapes: Sequence[Sequence[int | str]],
              sizes: ir.Value | None = None) -> list[ir.Value]:  # fmt: skip
        """Split along axis 0, in equal parts or in ``sizes``."""
        outputs = [
            ir.Value(name=name, type=value.type, shape=ir.Shape(shape))
            for name, shape in zip(names, shapes, strict=True)
        ]
        inputs = [value] if sizes is None else [value, sizes]
        attributes = {"axis": 0} if sizes is not None else {"axis": 0, "num_outputs": len(names)}
        self.nodes.append(ir.node("Split", inputs, attributes, outputs=outputs, name=f"{names[0]}/split"))
        return outputs
