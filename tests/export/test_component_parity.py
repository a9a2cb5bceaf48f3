"""Parity of the components beside the denoiser: what is held to which limit."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from sdq_export.families.component import ComponentExport, RoundingCost
from sdq_export.parity.components import check_component, component_outputs

GROUPS, CHANNELS = 2, 8


def component(example: Tensor) -> ComponentExport:
    cost = RoundingCost("", "", 0, lambda *_: (0.0, {}))
    return ComponentExport("vae_encoder", "vae", lambda part: part, {"images": example}, ("latents",), cost)


def norm_graph(gain: float = 1.0) -> ir.Model:
    """A group norm as the exporter writes it, of any size, times `gain`."""
    nodes = [
        helper.make_node("Reshape", ["images", "grouped"], ["groups"]),
        helper.make_node("InstanceNormalization", ["groups", "one", "zero"], ["normed"], epsilon=1e-6),
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Reshape", ["normed", "shape"], ["latents"]),
    ]
    constants = {
        "grouped": np.array([0, GROUPS, -1], np.int64),
        "one": np.full(GROUPS, gain, np.float32),
        "zero": np.zeros(GROUPS, np.float32),
    }
    dims = ["batch", CHANNELS, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, dims)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return ir.from_proto(model)


@pytest.mark.parametrize(("size", "limit"), [(64, 1e-4), (512, 1e-4), (1024, 8e-4)])
def test_large_images_are_forgiven_what_onnxruntimes_norm_loses(size: int, limit: float) -> None:
    images = torch.randn(1, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    wanted = component_outputs(nn.GroupNorm(GROUPS, CHANNELS, eps=1e-6, affine=False), images)
    criterion = check_component(norm_graph(), component(images), images, wanted)
    assert criterion.limit == pytest.approx(limit)
    assert criterion.passed
    wrong = check_component(norm_graph(gain=1.003), component(images), images, wanted)
    assert not wrong.passed


def test_a_component_of_tokens_has_one_limit() -> None:
    ids = torch.zeros(1, 2000, 2000)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["latents"])],
        "same",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 2000, 2000])],
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, [1, 2000, 2000])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    export = dataclasses.replace(component(ids), name="text_encoder")
    assert check_component(ir.from_proto(model), export, ids, [ids]).limit == 1e-4
