"""Number formats and precisions as data, and what engines say to them."""

from __future__ import annotations

from typing import get_args

import ml_dtypes
import numpy as np
import onnx
import pytest

from sdq_engines.backends.registry import ENGINE_NAMES
from sdq_engines.backends.supported import least_sm, refusal, require_architectures, require_engine
from sdq_engines.errors import SdqError
from sdq_engines.formats import (
    FP8,
    INT4,
    INT8,
    LAYER_FORMATS,
    PRECISIONS,
    NumberFormat,
    PrecisionName,
    formats_of,
    number_format,
)
from sdq_engines.lowering.graph import array_type


@pytest.mark.parametrize("format", [INT8, INT4, FP8, INT8.per_tensor(), FP8.per_tensor(), INT4.in_blocks(64)])
def test_a_format_is_found_by_its_name(format: NumberFormat) -> None:
    assert number_format(format.name) == format


@pytest.mark.parametrize("name", ["int8", "int3/channel", "int4/block", "int4/block8", "int8/row", "fp8/blocks64"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"one of int8, int4, fp8"):
        number_format(name)


@pytest.mark.parametrize("format", [INT8, INT4, FP8])
def test_limits_are_those_of_the_types(format: NumberFormat) -> None:
    kind = array_type(format.array_type)
    info = ml_dtypes.finfo(kind) if format is FP8 else ml_dtypes.iinfo(kind)
    assert (format.low, format.high) == (float(info.min), float(info.max))
    assert onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, format.onnx_type)) == kind
    assert np.dtype(array_type(format.stored)).itemsize == 1


def test_granularity_and_block_belong_together() -> None:
    assert INT4.in_blocks(32).per_channel() == INT4
    with pytest.raises(ValueError, match="by block"):
        number_format("int4/channel").in_blocks(None)  # type: ignore[arg-type]


def test_every_precision_is_a_preset_of_layers_that_exist() -> None:
    assert tuple(PRECISIONS) == get_args(PrecisionName)
    for precision in PRECISIONS.values():
        for layer in (precision.conv, precision.linear):
            assert LAYER_FORMATS[layer.name] == layer == formats_of(layer.weight, layer.activation)
    assert [name for name, each in PRECISIONS.items() if each.weights_alone] == ["w4a16"]
    with pytest.raises(ValueError, match="int4 and an input of fp8"):
        formats_of(INT4, FP8.per_tensor())


def test_weight_bits_change_the_weight_alone() -> None:
    assert PRECISIONS["w4a8"].conv.with_weight_bits(8) == PRECISIONS["w8a8"].conv
    assert PRECISIONS["w4a16"].linear.with_weight_bits(8) == LAYER_FORMATS["w8a16"]
    assert PRECISIONS["fp8"].conv.with_weight_bits(8) == PRECISIONS["fp8"].conv
    assert PRECISIONS["fp8"].conv.with_weight_bits(4) is None


def test_openvino_refuses_fp8_by_name_and_nothing_else_is_refused() -> None:
    refused = {(engine, name) for engine in ENGINE_NAMES for name in (*PRECISIONS, "fp32") if refusal(engine, name)}
    assert refused == {("openvino", "fp8")}
    with pytest.raises(SdqError, match="openvino cannot be built for a package of precision fp8 \\(FP8 E4M3\\)"):
        require_engine("openvino", "fp8")


def test_fp8_needs_sm_89() -> None:
    assert (least_sm("fp8"), least_sm("w4a8"), least_sm("fp16")) == (89, 75, 0)
    require_architectures("tensorrt-rtx", "fp8", [89, 120])
    require_architectures("tensorrt-rtx", "w4a8", [75, 86])
    with pytest.raises(SdqError, match=r"precision fp8 for sm_86: FP8 E4M3 needs sm_89 or newer"):
        require_architectures("tensorrt-rtx", "fp8", [120, 86])
