"""Each pass: the lowered graph computes what the canonical graph computes, and has the form that it promises."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from sdq_engines.backends.onnxruntime import OnnxRuntimeComponent, open_session
from sdq_engines.errors import SdqError
from sdq_engines.lowering.fold_fp16_storage import FoldFp16Storage
from sdq_engines.lowering.fp16 import ToBFloat16, ToFloat16
from sdq_engines.lowering.graph import apply, array_of, quantized_layers
from sdq_engines.lowering.regions import sampler_nodes
from sdq_engines.lowering.scalar_scales import ScalarScales
from sdq_engines.lowering.widen_int4 import WidenInt4
from tests.engines.graphs import ATTENTION, TinyShape, denoiser, text_encoder, vae_decoder

PRECISIONS = ["w8a8", "w4a8", "w4a16"]
STATE = {"latents", "history", "noise", "guidance_scale", "coefficients", "latents_out", "history_out"}


def lower(model: onnx.ModelProto, *passes: ir.passes.PassBase) -> onnx.ModelProto:
    lowered = ir.to_proto(apply(ir.from_proto(model), list(passes)))
    onnx.checker.check_model(lowered, full_check=True)
    return lowered


def feeds(model: onnx.ModelProto, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random, made = np.random.default_rng(seed), {}
    for value in model.graph.input:
        sizes = {"batch": batch, "2*batch": 2 * batch}
        shape = [sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        kind = value.type.tensor_type.elem_type
        if value.name == "step":
            made[value.name] = np.array(2)
        elif kind == onnx.TensorProto.INT64:
            made[value.name] = random.integers(0, 20, shape)
        else:
            dtype = np.float16 if kind == onnx.TensorProto.FLOAT16 else np.float32
            made[value.name] = np.asarray(random.standard_normal(shape)).astype(np.float16).astype(dtype)
    return made


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return OnnxRuntimeComponent(open_session(model.SerializeToString()), "cpu").run(inputs)


def distance(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    a, b = (np.concatenate([part.astype(np.float64).ravel() for part in side.values()]) for side in (left, right))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def weight_types(model: onnx.ModelProto) -> dict[str, np.dtype]:
    found = {}
    for layer in quantized_layers(ir.from_proto(model)):
        assert layer.weight_dequantize is not None
        array = array_of(layer.weight_dequantize.inputs[0])
        assert array is not None
        found[layer.name] = array.dtype
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_widening_changes_types_and_no_value(precision: str) -> None:
    model = denoiser(TinyShape(precision=precision))
    lowered = lower(model, WidenInt4())
    inputs = feeds(model)
    assert distance(run(lowered, inputs), run(model, inputs)) == 0.0
    kinds = weight_types(lowered)
    assert kinds["mid_block.resnets.0.conv1"] == np.int8
    linear = np.int8 if precision != "w4a16" else ml_dtypes.int4
    assert kinds[f"{ATTENTION}.attn1.to_q"] == linear
    if precision == "w4a8":
        assert set(weight_types(model).values()) == {np.dtype(ml_dtypes.int4)}


def test_widening_weight_only_layers_on_request() -> None:
    model = denoiser(TinyShape(precision="w4a16"))
    lowered = lower(model, WidenInt4(weight_only=True))
    assert set(weight_types(lowered).values()) == {np.dtype(np.int8)}
    inputs = feeds(model)
    assert distance(run(lowered, inputs), run(model, inputs)) < 1e-6


@pytest.mark.parametrize("maker", [denoiser, text_encoder, vae_decoder])
def test_folding_storage_is_exact(maker: Callable[[TinyShape], onnx.ModelProto]) -> None:
    model = maker(TinyShape())
    lowered = lower(model, FoldFp16Storage())
    inputs = feeds(model)
    assert distance(run(lowered, inputs), run(model, inputs)) == 0.0
    assert any(node.op_type == "Cast" for node in model.graph.node)
    assert not any(node.op_type == "Cast" for node in lowered.graph.node)


def test_one_element_scales_become_scalars() -> None:
    model = denoiser(TinyShape())
    for constant in model.graph.initializer:
        if constant.name.endswith(("/scale", "/zero")):
            constant.dims.append(1)  # the form that TensorRT misreads
    lowered = lower(model, ScalarScales())
    scales = [list(c.dims) for c in lowered.graph.initializer if c.name.endswith(("/scale", "/zero"))]
    assert scales
    assert all(dims == [] for dims in scales)
    inputs = feeds(model)
    assert distance(run(lowered, inputs), run(model, inputs)) == 0.0


@pytest.mark.parametrize("history", [0, 2])
def test_the_sampler_is_found(history: int) -> None:
    model = ir.from_proto(denoiser(TinyShape(history=history, stochastic=True)))
    found = {node.name for node in sampler_nodes(model)}
    wanted = {node.name for node in model.graph if node.name and node.name.startswith("sampler/")}
    assert found == wanted | {"latents_out"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp16_keeps_the_state_in_fp32_and_the_distance_to_the_graph_small(precision: str) -> None:
    model = denoiser(TinyShape(precision=precision, stochastic=True))
    lowered = lower(model, WidenInt4(), ScalarScales(), ToFloat16())
    inputs = feeds(model)
    halves = feeds(lowered)
    assert distance(run(lowered, halves), run(model, inputs)) < 6e-3
    for value in (*lowered.graph.input, *lowered.graph.output):
        kind = value.type.tensor_type.elem_type
        if value.name in STATE:
            assert kind == onnx.TensorProto.FLOAT, value.name
        elif value.name != "step":
            assert kind == onnx.TensorProto.FLOAT16, value.name
    casts = [node for node in lowered.graph.node if node.op_type == "Cast"]
    assert len(casts) == 2  # into the network and out of it
    typed = {output.name: output.dtype for node in ir.from_proto(lowered).graph for output in node.outputs}
    assert typed["sampler/guided"] == ir.DataType.FLOAT
    assert typed["silu"] == ir.DataType.FLOAT16


def test_fp16_clamps_what_it_cannot_hold_and_refuses_dead_scales() -> None:
    model = text_encoder(TinyShape())
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(-3.4e38), "mask"))
    last = model.graph.node[-1]
    assert last.op_type == "Tanh"
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("Max", [last.input[0], "mask"], ["masked"])
    )
    last.input[0] = "masked"
    lowered = lower(model, ToFloat16())
    masks = [onnx.numpy_helper.to_array(c) for c in lowered.graph.initializer if c.name == "mask/fp16"]
    assert masks[0] == np.finfo(np.float16).min
    quantized = denoiser(TinyShape())
    for constant in quantized.graph.initializer:
        if constant.name.endswith("conv1/scale"):
            constant.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-9), constant.name))
    with pytest.raises(SdqError, match="conv1/scale cannot be held in FP16"):
        apply(ir.from_proto(quantized), [ToFloat16()])


@pytest.mark.parametrize("maker", [text_encoder, vae_decoder])
def test_bf16_is_computed_inside_and_fp32_outside(maker: Callable[[TinyShape], onnx.ModelProto]) -> None:
    """onnx's own evaluator rounds every operator's result to the type that the graph gives it."""
    model = maker(TinyShape())
    lowered = lower(model, ToBFloat16())
    for value in (*lowered.graph.input, *lowered.graph.output):
        assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64), value.name
    graph = ir.from_proto(lowered)
    outside = sampler_nodes(graph)
    inside = [node for node in graph.graph if node not in outside and node.op_type != "Cast"]
    assert len(inside) > 3
    assert {output.dtype for node in inside for output in node.outputs} == {ir.DataType.BFLOAT16}
    inputs = feeds(model)
    names = [output.name for output in lowered.graph.output]
    found = dict(zip(names, ReferenceEvaluator(lowered).run(None, inputs), strict=True))
    assert 5e-4 < distance(found, run(model, inputs)) < 6e-3


def stored_as_bf16(array: np.ndarray) -> onnx.ModelProto:
    """x times a weight that is stored as BF16."""
    stored = onnx.TensorProto(name="w", data_type=onnx.TensorProto.BFLOAT16, dims=array.shape)
    stored.raw_data = array.astype(ml_dtypes.bfloat16).tobytes()
    nodes = [
        onnx.helper.make_node("Cast", ["w"], ["wide"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["x", "wide"], ["images"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", array.shape[0]), ("images", array.shape[1]))
    ]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], [stored])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def test_weights_stored_as_bf16_are_lowered_to_what_the_engine_computes_in() -> None:
    array = np.array([[1e6, 2.0**-20], [-1e6, 3.0]], np.float32)
    model = stored_as_bf16(array)
    exact = array.astype(ml_dtypes.bfloat16).astype(np.float32)
    x = {"x": np.eye(2, dtype=np.float32)}
    assert np.array_equal(run(model, x)["images"], exact)
    folded = lower(model, FoldFp16Storage())
    assert [node.op_type for node in folded.graph.node] == ["MatMul"]
    assert np.array_equal(run(folded, x)["images"], exact)
    half = lower(model, ToFloat16())
    (weight,) = (onnx.numpy_helper.to_array(constant) for constant in half.graph.initializer)
    assert weight.dtype == np.float16
    assert np.array_equal(weight, np.clip(exact, -65504, 65504).astype(np.float16))
    short = lower(model, ToBFloat16())
    assert [constant.data_type for constant in short.graph.initializer] == [onnx.TensorProto.BFLOAT16]
    assert "wide" not in [name for node in short.graph.node for name in node.output]


def test_integers_made_of_constants_are_computed_in_fp32() -> None:
    """A T5's buckets of relative positions: in BF16 the logarithms of 100 and of 101 are one number."""
    positions = np.arange(1, 300, dtype=np.int64)
    factor = np.float32(40)
    nodes = [
        onnx.helper.make_node("Cast", ["positions"], ["real"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Log", ["real"], ["logarithm"]),
        onnx.helper.make_node("Mul", ["logarithm", "factor"], ["scaled"]),
        onnx.helper.make_node("Cast", ["scaled"], ["buckets"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Gather", ["table", "buckets"], ["bias"]),
        onnx.helper.make_node("Add", ["x", "bias"], ["sum"]),
    ]
    table = np.arange(256, dtype=np.float32)
    constants = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("positions", positions), ("factor", factor), ("table", table))
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [299]) for name in ("x", "sum")]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    inputs = {"x": np.zeros(299, np.float32)}
    (found,) = ReferenceEvaluator(lower(model, ToBFloat16())).run(None, inputs)
    assert np.array_equal(found, run(model, inputs)["sum"])


def test_bf16_keeps_the_mean_of_squares_in_fp32() -> None:
    """A T5's normalization, of numbers whose squares FP16 cannot hold."""
    chain = [("Pow", ["h", "two"]), ("ReduceMean", ["Pow", "axis"]), ("Add", ["ReduceMean", "epsilon"]),
             ("Sqrt", ["Add"]), ("Reciprocal", ["Sqrt"]), ("Mul", ["h", "Reciprocal"])]  # fmt: skip
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["h"])]
    nodes += [onnx.helper.make_node(kind, inputs, [kind]) for kind, inputs in chain]
    nodes.append(onnx.helper.make_node("MatMul", ["Mul", "w"], ["y"]))
    constants = {"two": np.float32(2), "axis": np.array([-1]), "epsilon": np.float32(1e-6), "w": np.eye(64) * 1000}
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 64])],
        [
            onnx.numpy_helper.from_array(array if name == "axis" else array.astype(np.float32), name)
            for name, array in constants.items()
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    lowered = lower(model, ToBFloat16())
    typed = {value.name: value.dtype for node in ir.from_proto(lowered).graph for value in node.outputs}
    assert {typed[name] for name in ("Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal")} == {ir.DataType.FLOAT}
    assert {typed[name] for name in ("h", "Mul")} == {ir.DataType.BFLOAT16}
    inputs = {"x": np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)}
    (found,) = ReferenceEvaluator(lowered).run(None, inputs)
    assert distance({"y": found}, run(model, inputs)) < 4e-3
