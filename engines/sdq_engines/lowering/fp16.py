"""FP16 and BF16 typing for NVIDIA engines: networks are strongly typed, so the graph's types are the engine's."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdq_engines.errors import SdqError
from sdq_engines.lowering.graph import array_of, cast_node, replace_constant
from sdq_engines.lowering.regions import STATE_INPUTS, constant_values, sampler_nodes
from sdq_engines.package.schema import SIZE_INPUT

__all__ = ["ToBFloat16", "ToFloat16"]

_FLOAT = ir.DataType.FLOAT
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SUFFIXES = {_FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_HALF_MAX = float(np.finfo(np.float16).max)
#: Inputs that ONNX types as FP32 whatever the data's type: Resize's scales.
_STAYS_FLOAT = {"Resize": {2}}
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
#: Inputs and outputs that are FP32 in every engine, so that the sampler's state keeps its precision.
_FLOAT_IO = STATE_INPUTS | {"latents_out", "history_out", "images", SIZE_INPUT}
#: Functions of an angle, which may be a size of a thousand pixels: in FP16 it would be off by half a radian.
_OF_ANGLES = ("Sin", "Cos")
_BFLOAT16_OPSET = 22
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


class ToFloat16(ir.passes.InPlacePass):
    """Compute the network in FP16 and keep in FP32 the sampler around it, guidance included, and sinusoids of numbers.

    Requires: no subgraphs.
    Ensures: every operator outside the sampler (see `sampler_nodes`) and the angles of sinusoids has FP16 where it had
    FP32, Q/DQ scales included; the state's inputs and outputs, `time_ids` and the images stay FP32, other floating
    inputs and outputs become FP16. Cases:
    1. an FP32 constant used by FP16 operators: converted; finite values beyond FP16's range are clamped to it (an
       attention mask's -3.4e38 would become -inf and its softmax NaN);
    2. a constant used on both sides, or by an input that ONNX fixes to FP32: a second copy;
    3. a value that crosses between the sampler and the network: one Cast, shared by its consumers;
    4. a Cast to FP32 of an FP16 constant (the package's storage form): dropped; of a BF16 one: as in case 1;
    5. floats of constants alone that become integers, such as a lookup's: FP32.

    Raises:
        SdqError: a quantization scale becomes 0, infinite or not a number in FP16; it names the constant.
    """

    half: ClassVar[ir.DataType] = ir.DataType.FLOAT16

    def float_names(self, model: ir.Model) -> Collection[str | None]:
        """Inputs and outputs that stay FP32."""
        return _FLOAT_IO

    def float_nodes(self, nodes: list[ir.Node]) -> set[ir.Node]:
        """Further operators that compute in FP32."""
        return set()

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                raise ir.passes.PreconditionError(f"{node.name}: subgraphs cannot be typed")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        # Hand-made or edited values may carry no type; everything below decides by type.
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
        _complete_types(model)
        nodes = list(model.graph)
        full = sampler_nodes(model) | _angles(nodes) | self.float_nodes(nodes)
        typing = _Typing(model, self.half, self.float_names(model))
        for value in model.graph.inputs:
            if value.dtype == _FLOAT and value.name not in typing.float_names:
                value.dtype = self.half
        for node in nodes:
            if node not in full:
                typing.make_half(node)
        for node in nodes:
            typing.match_inputs(node, half=node not in full)
        for value in list(model.graph.outputs):
            typing.match_output(value)
        typing.drop_idle_casts()
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name in self.float_names(model) and value.dtype != _FLOAT:
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}, FP32 was promised")


class ToBFloat16(ToFloat16):
    """Compute the network in BF16: FP32's range in half the bytes, with 8 bits of precision where FP16 has 11.

    For components that overflow in FP16.

    Requires, ensures: as `ToFloat16`, but nothing is clamped, and all floating inputs and outputs stay FP32, as
    numpy and the runtime know no BF16, and so do the means of squares that a T5 normalizes by, as in transformers.
    The graph is of opset 22, which is 21 with convolutions that are defined for BF16.
    """

    half = ir.DataType.BFLOAT16

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = super().call(model)
        model.graph.opset_imports[""] = max(model.graph.opset_imports[""], _BFLOAT16_OPSET)
        return result

    def float_names(self, model: ir.Model) -> Collection[str | None]:
        values = (*model.graph.inputs, *model.graph.outputs)
        return {value.name for value in values if value.dtype in (_FLOAT, *_HALVES)}

    def float_nodes(self, nodes: list[ir.Node]) -> set[ir.Node]:
        """Each mean, the square before it, and the root and reciprocal after it."""
        found = {node for node in nodes if node.op_type == "ReduceMean"}
        found |= {node for node in nodes if node.op_type == "Pow" and found.issuperset(node.outputs[0].consumers())}
        for node in nodes:  # in topological order
            before = {value.producer() for value in node.inputs if value is not None and not value.is_initializer()}
            if node.op_type in ("Add", "Sqrt", "Reciprocal") and before and before <= found:
                found.add(node)
        return found


class _Typing:
    """The casts and converted constants that one model has so far."""

    def __init__(self, model: ir.Model, half: ir.DataType, float_names: Collection[str | None]) -> None:
        self.graph, self.half, self.float_names = model.graph, half, set(float_names)
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.copies: dict[ir.Value, ir.Value] = {}

    def make_half(self, node: ir.Node) -> None:
        """Set the node's own attributes and outputs to 16 bits where they were FP32."""
        for key in _TYPE_ATTRIBUTES:
            if key in node.attributes and node.attributes[key].value == _FLOAT:
                node.attributes[key] = ir.AttrInt64(key, self.half)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            filler = node.attributes["value"].as_tensor()
            if filler.dtype == _FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self.to_half(filler.numpy())))
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.dtype = self.half

    def match_inputs(self, node: ir.Node, half: bool) -> None:
        """Convert constants and cast values so that every floating input of the node has the node's type."""
        if node.op_type == "Cast":
            return
        fixed = _STAYS_FLOAT.get(node.op_type, set())
        wanted = self.half if half else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, self.half) or value.dtype == wanted or index in fixed:
                continue
            if value.is_initializer() and half:
                node.replace_input_with(index, self.half_constant(value, node))
            else:
                node.replace_input_with(index, self.cast(value, wanted))

    def half_constant(self, value: ir.Value, node: ir.Node) -> ir.Value:
        if value in self.copies:
            return self.copies[value]
        array = array_of(value)
        assert array is not None
        half = self.to_half(array)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not (
            np.isfinite(half).all() and (half > 0).all()
        ):
            raise SdqError(
                f"The scale {value.name} cannot be held in {_SUFFIXES[self.half].upper()}: "
                f"it spans {array.min():.3g} to {array.max():.3g}.",
                "Build this package for onnxruntime or openvino, or keep that layer unquantized.",
            )
        copy = ir.Value(name=f"{value.name}/{_SUFFIXES[self.half]}")
        replace_constant(copy, half)
        self.graph.register_initializer(copy)
        self.copies[value] = copy
        return copy

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        key = (value, to)
        if key not in self.casts:
            node = cast_node(value, to, f"{value.name}/to_{_SUFFIXES[to]}")
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            self.casts[key] = node.outputs[0]
        return self.casts[key]

    def match_output(self, value: ir.Value) -> None:
        """A graph output that must be FP32 but became shorter is cast, and the cast takes over its name."""
        if value.name not in self.float_names or value.dtype != self.half:
            return
        name = value.name
        value.name = f"{name}/{_SUFFIXES[self.half]}"
        output = self.cast(value, _FLOAT)
        output.name = name
        self.graph.outputs[list(self.graph.outputs).index(value)] = output

    def drop_idle_casts(self) -> None:
        """Case 4, and any Cast to the type that its input already has."""
        for node in list(self.graph):
            if node.op_type != "Cast" or node.outputs[0].is_graph_output():
                continue
            source, to = node.inputs[0], node.attributes["to"].as_int()
            if source is not None and source.is_initializer() and source.dtype in _HALVES and to == self.half:
                source = source if source.dtype == to else self.half_constant(source, node)
            if source is not None and source.dtype == to:
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def to_half(self, array: np.ndarray) -> np.ndarray:
        if self.half == ir.DataType.BFLOAT16:
            return array.astype(ml_dtypes.bfloat16)
        wide = array.astype(np.float32)
        return np.where(np.isfinite(wide), np.clip(wide, -_HALF_MAX, _HALF_MAX), wide).astype(np.float16)


def _complete_types(model: ir.Model) -> None:
    """Type what ONNX's inference leaves open (function operators such as GroupNormalization) like its input."""
    for node in model.graph:
        known = [value.dtype for value in node.inputs if value is not None and value.dtype is not None]
        for output in node.outputs:
            if output.dtype is None and known:
                output.dtype = known[0]


def _angles(nodes: list[ir.Node]) -> set[ir.Node]:
    """Every sinusoid, every integer made of constants, and what angle and integer are computed by."""
    constant = constant_values(nodes)
    found = {
        node
        for node in nodes
        if node.op_type in _OF_ANGLES
        or (node.op_type == "Cast" and node.outputs[0].dtype in _INTEGERS and node.inputs[0] in constant)
    }
    wanted = {value for node in found for value in node.inputs}
    for node in reversed(nodes):
        if any(output in wanted for output in node.outputs):
            found.add(node)
            wanted.update(node.inputs)
    return found
