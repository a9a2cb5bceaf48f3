"""What is folded after a graph has its values, and what is left because it would grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from sdq_export.passes.fold_constants import FoldConstants

TABLE: NDArray[Any] = np.random.default_rng(0).normal(size=(1, 24 * 24, 32)).astype(np.float32)


class Graph:
    """A graph that adds what `make` computes to its input, as the end of a chain is read in a network."""

    def __init__(self) -> None:
        self.tape = tape.Tape()
        self.input = ir.Value(name="x", shape=ir.Shape(["batch", 1, 1]), type=ir.TensorType(ir.DataType.FLOAT))

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self.tape.initializer(ir.tensor(array, name=name), name=name)

    def ints(self, name: str, *values: int) -> ir.Value:
        return self.constant(name, np.array(values, np.int64))

    def op(self, kind: str, inputs: list[ir.Value], shape: tuple[int, ...], **attributes: Any) -> ir.Value:
        value: ir.Value = self.tape.op(kind, inputs, attributes)
        value.shape, value.dtype = ir.Shape(shape), inputs[0].dtype
        return value

    def model(self, *ends: ir.Value) -> ir.Model:
        outputs = [self.op("Add", [self.input, end], (1,)) for end in ends]
        graph = ir.Graph(
            [self.input],
            outputs,
            nodes=self.tape.nodes,
            initializers=list(self.tape.initializers),
            opset_imports={"": 21},
            name="graph",
        )
        for number, output in enumerate(outputs):
            output.name, output.shape = f"y{number}", None
        return ir.Model(graph, ir_version=10)


def crop(graph: Graph, table: ir.Value) -> ir.Value:
    """Rows and columns 10 to 13 of 24, as diffusers' `PatchEmbed.cropped_pos_embed` takes them."""
    start, end = graph.ints("start", 10), graph.ints("end", 14)
    whole = graph.op("Reshape", [table, graph.ints("grid", 1, 24, 24, -1)], (1, 24, 24, 32))
    rows = graph.op("Slice", [whole, start, end, graph.ints("rows", 1)], (1, 4, 24, 32))
    both = graph.op("Slice", [rows, start, end, graph.ints("columns", 2)], (1, 4, 4, 32))
    return graph.op("Reshape", [both, graph.ints("flat", 1, 16, 32)], (1, 16, 32))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def nbytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def test_a_chain_that_shrinks_becomes_one_constant() -> None:
    graph = Graph()
    model = graph.model(crop(graph, graph.constant("table", TABLE)))
    assert FoldConstants()(model).modified
    assert kinds(model) == ["Add"]
    (left,) = model.graph.initializers.values()
    assert left.const_value is not None
    wanted = TABLE.reshape(1, 24, 24, 32)[:, 10:14, 10:14].reshape(1, 16, 32)
    assert np.array_equal(left.const_value.numpy(), wanted)
    assert not FoldConstants()(model).modified


def test_a_table_that_others_read_stays_whole() -> None:
    graph = Graph()
    table = graph.constant("table", TABLE)
    model = graph.model(crop(graph, table), table)
    before = nbytes(model)
    FoldConstants()(model)
    assert nbytes(model) <= before
    assert kinds(model) == ["Reshape", "Slice", "Slice", "Reshape", "Add", "Add"]


def test_what_grows_stays_and_what_is_before_it_is_folded() -> None:
    """Buckets of relative positions, then a lookup of many heads, as in a T5."""
    graph = Graph()
    positions = graph.constant("positions", np.arange(64, dtype=np.int64).reshape(8, 8))
    least = graph.op("Min", [positions, graph.constant("most", np.full((8, 8), 5, np.int64))], (8, 8))
    buckets = graph.op("Min", [positions, least], (8, 8))
    bias = graph.op("Gather", [graph.constant("weight", np.ones((6, 16), np.float32)), buckets], (8, 8, 16))
    model = graph.model(bias)
    before = nbytes(model)
    assert FoldConstants()(model).modified
    assert kinds(model) == ["Gather", "Add"]
    assert nbytes(model) == before - 8 * 8 * 8


def test_a_detour_over_a_larger_value_is_not_taken() -> None:
    graph = Graph()
    row = graph.constant("row", np.ones((1, 32), np.float32))
    wide = graph.op("Expand", [row, graph.ints("shape", 1 << 30, 32)], (1 << 30, 32))
    end = graph.ints("end", 1)
    model = graph.model(graph.op("Slice", [wide, graph.ints("start", 0), end, graph.ints("axis", 0)], (1, 32)))
    assert not FoldConstants()(model).modified
    assert kinds(model) == ["Expand", "Slice", "Add"]
