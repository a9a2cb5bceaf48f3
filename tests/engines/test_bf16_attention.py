"""Attention in BF16: where it is typed, what it changes, and that OpenVINO builds and runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sdq_engines.build import build_engine
from sdq_engines.lowering.bf16_attention import LEAST_KEYS, Bf16Attention
from sdq_engines.lowering.graph import apply
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.runtime.pipeline import Pipeline
from tests.engines.graphs import TinyShape
from tests.engines.packages import make_package

HEADS, WIDTH = 2, 40


def attention(queries: int, keys: int | str, scaled: bool = False) -> onnx.ModelProto:
    """softmax(Q K) V of one sample; `scaled` puts a product between the first two."""
    nodes = [helper.make_node("MatMul", ["q", "k"], ["scores"], "attn/MatMul")]
    if scaled:
        nodes.append(helper.make_node("Mul", ["scores", "factor"], ["scaled"], "attn/Mul"))
    nodes += [
        helper.make_node("Softmax", ["scaled" if scaled else "scores"], ["weights"], "attn/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"], "attn/MatMul_2"),
        helper.make_node("Transpose", ["mixed"], ["out"], "attn/Transpose", perm=[0, 2, 1, 3]),
    ]
    shapes = {"q": [1, HEADS, queries, WIDTH], "k": [1, HEADS, WIDTH, keys], "v": [1, HEADS, keys, WIDTH]}
    middle = {name: [1, HEADS, queries, keys] for name in ("scores", "weights", *["scaled"][:scaled])}
    middle["mixed"] = [1, HEADS, queries, WIDTH]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "attention",
        [value(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [value("out", TensorProto.FLOAT, [1, queries, HEADS, WIDTH])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [0.5])] if scaled else [],
        value_info=[value(name, TensorProto.FLOAT, shape) for name, shape in middle.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def lowered(model: onnx.ModelProto, *arguments: int) -> onnx.ModelProto:
    result = ir.to_proto(apply(ir.from_proto(model), [Bf16Attention(*arguments)]))
    onnx.checker.check_model(result, full_check=True)
    return result


def casts(model: onnx.ModelProto) -> list[int]:
    return [node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"]


def test_long_attention_is_bf16_between_its_operands_and_its_result() -> None:
    found = lowered(attention(8, LEAST_KEYS))
    assert casts(found) == [TensorProto.BFLOAT16] * 3 + [TensorProto.FLOAT]
    types = {info.name: info.type.tensor_type.elem_type for info in found.graph.value_info}
    assert {types[name] for name in ("scores", "weights", "mixed")} == {TensorProto.BFLOAT16}
    assert [node.op_type for node in found.graph.node][-2:] == ["Cast", "Transpose"]
    assert found.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize(
    "model",
    [attention(8, LEAST_KEYS - 1), attention(8, "keys"), attention(8, LEAST_KEYS, scaled=True)],
    ids=["short", "unknown", "scaled"],
)
def test_other_attention_stays_as_it_is(model: onnx.ModelProto) -> None:
    assert casts(lowered(model)) == []


def test_openvino_computes_it_to_the_precision_of_bf16(tmp_path: Path) -> None:
    """Relative L2 against float64: more than FP32's noise (it is BF16 that runs, where the machine has it), less than
    one part in a hundred."""
    openvino = pytest.importorskip("openvino")
    from sdq_engines.backends.openvino.library import PROPERTIES

    model = attention(64, LEAST_KEYS)
    path = tmp_path / "attention.onnx"
    onnx.save(lowered(model), path)
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", PROPERTIES).create_infer_request()
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(shape).astype(np.float32) for shape in
               ((1, HEADS, 64, WIDTH), (1, HEADS, WIDTH, LEAST_KEYS), (1, HEADS, LEAST_KEYS, WIDTH)))  # fmt: skip
    found = request.infer({"q": q / np.sqrt(WIDTH), "k": k, "v": v})["out"]
    scores = (q.astype(np.float64) / np.sqrt(WIDTH)) @ k
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = ((weights / weights.sum(-1, keepdims=True)) @ v).transpose(0, 2, 1, 3)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert (1e-4 if bf16 else 0) < error < 1e-2


def test_a_quantized_denoiser_of_many_tokens_has_it_unless_fp32_is_asked_for(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package", TinyShape(latent=32))  # 32 x 32 tokens
    without = build_engine(package, "openvino", ShapeProfile(batch_max=1), {"fp32": ["denoiser"]})
    assert without.manifest.engines["openvino"].options == {"fp32": ["denoiser"]}
    exact = Pipeline.from_package(without, "openvino")("red circle", seed=1).latents
    package = build_engine(without, "openvino", ShapeProfile(batch_max=1))
    typed = Pipeline.from_package(package, "openvino")("red circle", seed=1).latents
    error = float(np.linalg.norm(typed - exact) / np.linalg.norm(exact))
    bf16 = "BF16" in pytest.importorskip("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert error < 3e-2  # the sum of a few steps; W8A8's own error is as large
    assert (error > 0) == bf16
