"""FP16 typing for NVIDIA engines: networks are strongly typed, so the graph's types are the engine's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from sdq_engines.errors import SdqError
from sdq_engines.lowering.graph import array_of, replace_constant
from sdq_engines.lowering.regions import STATE_INPUTS, sampler_nodes
from sdq_engines.package.schema import SIZE_INPUT

__all__ = ["ToFloat16"]

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_HALF_MAX = float(np.finfo(np.float16).max)
#: Inputs that ONNX types as FP32 whatever the data's type: Resize's scales.
_STAYS_FLOAT = {"Resize": {2}}
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
#: Inputs and outputs that are FP32 in every engine, so that the sampler's state keeps its precision.
_FLOAT_IO = STATE_INPUTS | {"latents_out", "history_out", "images", SIZE_INPUT}
#: Functions of an angle, which may be a size of a thousand pixels: in FP16 it would be off by half a radian.
_OF_ANGLES = ("Sin", "Cos")


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
    4. a Cast to FP32 of an FP16 constant (the package's storage form): dropped.

    Raises:
        SdqError: a quantization scale becomes 0, infinite or not a number in FP16; it names the constant.
    """

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
        full = sampler_nodes(model) | _angles(nodes)
        typing = _Typing(model)
        for value in model.graph.inputs:
            if value.dtype == _FLOAT and value.name not in _FLOAT_IO:
                value.dtype = _HALF
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
            if value.name in _FLOAT_IO and value.dtype != _FLOAT:
                raise ir.passes.PostconditionError(f"{value.name} is {value.dtype}, FP32 was promised")


class _Typing:
    """The casts and converted constants that one model has so far."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.copies: dict[ir.Value, ir.Value] = {}

    def make_half(self, node: ir.Node) -> None:
        """Set the node's own attributes and outputs to FP16 where they were FP32."""
        for key in _TYPE_ATTRIBUTES:
            if key in node.attributes and node.attributes[key].value == _FLOAT:
                node.attributes[key] = ir.AttrInt64(key, _HALF)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            filler = node.attributes["value"].as_tensor()
            if filler.dtype == _FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_to_half(filler.numpy())))
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.dtype = _HALF

    def match_inputs(self, node: ir.Node, half: bool) -> None:
        """Convert constants and cast values so that every floating input of the node has the node's type."""
        if node.op_type == "Cast":
            return
        fixed = _STAYS_FLOAT.get(node.op_type, set())
        wanted = _HALF if half else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, _HALF) or value.dtype == wanted or index in fixed:
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
        half = _to_half(array)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not (
            np.isfinite(half).all() and (half > 0).all()
        ):
            raise SdqError(
                f"The scale {value.name} cannot be held in FP16: it spans {array.min():.3g} to {array.max():.3g}.",
                "Build this package for onnxruntime or openvino, or keep that layer unquantized.",
            )
        copy = ir.Value(name=f"{value.name}/fp16")
        replace_constant(copy, half)
        self.graph.register_initializer(copy)
        self.copies[value] = copy
        return copy

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        key = (value, to)
        if key not in self.casts:
            suffix = "to_fp16" if to == _HALF else "to_fp32"
            node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}/{suffix}")
            output = node.outputs[0]
            output.name, output.dtype, output.shape = f"{value.name}/{suffix}", to, value.shape
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
            self.casts[key] = output
        return self.casts[key]

    def match_output(self, value: ir.Value) -> None:
        """A graph output that must be FP32 but became FP16 is cast, and the cast takes over its name."""
        if value.name not in _FLOAT_IO or value.dtype != _HALF:
            return
        name = value.name
        value.name = f"{name}/fp16"
        output = self.cast(value, _FLOAT)
        output.name = name
        self.graph.outputs[list(self.graph.outputs).index(value)] = output

    def drop_idle_casts(self) -> None:
        """Case 4, and any Cast to the type that its input already has."""
        for node in list(self.graph):
            if node.op_type != "Cast" or node.outputs[0].is_graph_output():
                continue
            source = node.inputs[0]
            if source is not None and source.dtype == node.attributes["to"].as_int():
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def _complete_types(model: ir.Model) -> None:
    """Type what ONNX's inference leaves open (function operators such as GroupNormalization) like its input."""
    for node in model.graph:
        known = [value.dtype for value in node.inputs if value is not None and value.dtype is not None]
        for output in node.outputs:
            if output.dtype is None and known:
                output.dtype = known[0]


def _angles(nodes: list[ir.Node]) -> set[ir.Node]:
    """Every sinusoid and what its angle is computed by."""
    found = {node for node in nodes if node.op_type in _OF_ANGLES}
    wanted = {value for node in found for value in node.inputs}
    for node in reversed(nodes):
        if any(output in wanted for output in node.outputs):
            found.add(node)
            wanted.update(node.inputs)
    return found


def _to_half(array: np.ndarray) -> np.ndarray:
    clamped = np.where(np.isfinite(array), np.clip(array, -_HALF_MAX, _HALF_MAX), array)
    return clamped.astype(np.float16)
