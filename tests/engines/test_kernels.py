"""The counters read what TensorRT's and OpenVINO's lists say, form by form."""

from __future__ import annotations

import pytest

from sdq_engines.backends.kernels import CompiledLayer, tensorrt_layers

_DATA = "{{ Name: x, Dimensions: [1,64,32,32], StrideOrder: [0], Datatype: {0}, Format: (NHWC) Channel major format }}"


def line(kind: str, inputs: list[str], constants: list[str], source: str) -> str:
    """One line as TensorRT-RTX 1.7.1 prints it at detailed verbosity."""
    data = [", ".join(_DATA.format(name) for name in names) for names in (inputs, constants)]
    return (
        f"Name: {source}_myl0_5, LayerType: {kind}, Inputs: [ {data[0]}], Constants: [ {data[1]}], "
        f"Outputs: [ {_DATA.format('Float')}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: "
        f"[ONNX Layer: {source}/dequantize][ONNX Layer: {source}]"
    )


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "int8", "int4", "fp8"),
    [
        ("correlation", ["Int8"], ["Int8", "Float", "Float"], True, False, False),
        ("gemm", ["Int8", "Int8"], ["Float"], True, False, False),
        ("correlation", ["Half", "Half"], ["Float"], False, False, False),  # decompressed to half first
        ("correlation", ["Half"], ["Int8", "Float"], False, False, False),  # weight only
        ("runtime_fusion", ["Half"], ["Int4", "Half"], False, True, False),
        ("gemm", ["Int8"], ["Int4"], False, True, False),
        ("correlation", ["FP8"], ["FP8", "Float", "Float"], False, False, True),
        ("gemm", ["Half"], ["FP8", "Float"], False, False, False),
    ],
)
def test_a_kernel_is_judged_by_its_operands(
    kind: str, inputs: list[str], constants: list[str], int8: bool, int4: bool, fp8: bool
) -> None:
    (found,) = tensorrt_layers("Layers:\n" + line(kind, inputs, constants, "down.0.conv1"))
    assert (found.multiplies("int8"), found.reads("int4"), found.multiplies("fp8")) == (int8, int4, fp8)
    assert "down.0.conv1" in found.sources


def test_kernels_that_move_data_are_not_counted() -> None:
    assert list(tensorrt_layers(line("kgen", ["Int8", "Int8"], ["Int8"], "down.0.conv1"))) == []
    assert list(tensorrt_layers("[TRT] [V] Parsing node: down.0.conv1 [Conv]")) == []


def test_two_int8_operands_are_needed() -> None:
    assert not CompiledLayer(frozenset(), ("int8_t", "float32"), ()).multiplies("int8")
    assert CompiledLayer(frozenset(), ("uint8_t", "int8_t"), ()).multiplies("int8")
