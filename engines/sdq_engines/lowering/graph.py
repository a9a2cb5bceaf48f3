"""What several passes ask of a graph: constants, quantized layers, the way back from an operator to its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike

from sdq_engines.errors import SdqError
from sdq_engines.formats import LAYER_FORMATS, LayerFormats

__all__ = [
    "LAYER_KEY",
    "PRECISION_KEY",
    "QuantizedLayer",
    "apply",
    "array_of",
    "array_type",
    "cast_node",
    "load_graph",
    "quantized_layers",
    "replace_constant",
    "retype_constant",
]

#: Metadata of a quantized operator: its layer's path, and a name of `formats.LAYER_FORMATS`.
LAYER_KEY = "sdq.layer"
PRECISION_KEY = "sdq.precision"


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized Conv, Gemm or MatMul of the canonical graph."""

    name: str
    precision: str
    node: ir.Node

    @property
    def formats(self) -> LayerFormats:
        """What its operands are quantized to.

        Raises:
            SdqError: this version knows no such layer.
        """
        found = LAYER_FORMATS.get(self.precision)
        if found is None:
            raise SdqError(
                f"The layer {self.name} is marked {self.precision!r}, which is none of {', '.join(LAYER_FORMATS)}.",
                "Export the package again, or upgrade sdq-deploy.",
            )
        return found

    @property
    def weight_dequantize(self) -> ir.Node | None:
        """The DequantizeLinear that makes the weight (the operator's second input); None where there is none."""
        value = self.node.inputs[1] if len(self.node.inputs) > 1 else None
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type == "DequantizeLinear":
                integers = producer.inputs[0]
                return producer if integers is not None and integers.is_initializer() else None
            if producer.op_type not in ("Transpose", "Reshape", "Cast"):
                return None
            value = producer.inputs[0]
        return None


def load_graph(path: Path) -> ir.Model:
    """Read an ONNX file; its external weights stay on disk until a pass asks for them."""
    try:
        return ir.load(path)
    except Exception as error:
        raise SdqError(f"{path} is not a readable ONNX graph: {error}.", "Export the package again.") from error


def quantized_layers(model: ir.Model) -> Iterator[QuantizedLayer]:
    """The quantized layers of a canonical graph, in graph order, by the metadata that the export left on them."""
    for node in model.graph:
        name = node.metadata_props.get(LAYER_KEY)
        if name is not None:
            yield QuantizedLayer(name, node.metadata_props.get(PRECISION_KEY, ""), node)


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The constant's array, or None if `value` is not a constant."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def array_type(name: str) -> np.dtype:
    """The numpy type of this name, one of `NumberFormat`'s: numpy's own or ml_dtypes'."""
    return np.dtype(getattr(ml_dtypes, name, name))


def cast_node(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """A Cast of `value` that is in no graph yet; it and its output are called `name`."""
    node = ir.node("Cast", [value], {"to": to}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, to, value.shape
    return node


def replace_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer a new array; its type and shape follow."""
    tensor = ir.tensor(array, name=value.name)
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(array.shape)


def retype_constant(value: ir.Value, dtype: DTypeLike) -> None:
    """Store an initializer's numbers, which must fit, as another numpy (or ml_dtypes) type."""
    array = array_of(value)
    assert array is not None
    replace_constant(value, array.astype(dtype))


def apply(model: ir.Model, passes: list[ir.passes.PassBase]) -> ir.Model:
    """Run the passes in order; each one's `requires` and `ensures` are checked."""
    for item in passes:
        model = item(model).model
    return model
