"""Quantized weights behind DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_engines.lowering.graph import LAYER_KEY, PRECISION_KEY, array_type
from sdq_export.checkpoint import weight_key, weight_scale_key
from sdq_export.graph import NodeList, constant, layers_of
from sdq_export.passes.clean_up import RemoveDeadCode
from sdq_export.quantspec import QuantSpec, WeightSite

__all__ = ["QuantizeWeights"]


class QuantizeWeights(ir.passes.InPlacePass):
    """Replace the weight of each site by its codes behind a DequantizeLinear; mark the layer's operator.

    Cases, by what the exporter made of the layer:
    1. Conv: the weight is [C_out, C_in, kh, kw], channels on axis 0;
    2. MatMul, a Linear over sequences: the weight is transposed, [C_in, C_out], channels on axis 1, blocks along 0;
    3. Gemm, a Linear over vectors: [C_out, C_in] as in torch, channels on axis 0, blocks along 1.

    Requires: each weight site is a layer of the graph.
    Ensures: each site's operator reads a DequantizeLinear of a constant.

    Args:
        spec: the sites.
        tensors: codes and scales by the keys of `sdq_export.checkpoint`.
    """

    def __init__(self, spec: QuantSpec, tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.spec = spec
        self.tensors = tensors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        layers, formats = layers_of(model), self.spec.formats
        for site in self.spec.weights:
            node = layers[site.layer]
            self._quantize(model.graph, node, site)
            node.metadata_props[LAYER_KEY] = site.layer
            node.metadata_props[PRECISION_KEY] = formats[site.layer].name
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=bool(self.spec.weights))

    def requires(self, model: ir.Model) -> None:
        """Every site is there."""
        missing = sorted({site.layer for site in self.spec.weights} - layers_of(model).keys())
        if missing:
            raise ir.passes.PreconditionError(f"the graph has no layer {', '.join(missing)}")

    def ensures(self, model: ir.Model) -> None:
        """Every site reads codes."""
        left = {site.layer for site in self.spec.weights} & layers_of(model).keys()
        if left:
            raise ir.passes.PostconditionError(f"the weights of {', '.join(sorted(left))} are still floating point")

    def _quantize(self, graph: ir.Graph, node: ir.Node, site: WeightSite) -> None:
        codes, scale = self.tensors[weight_key(site.layer)], self.tensors[weight_scale_key(site.layer)]
        channel_axis = 0
        if _is_transposed(node):
            codes, scale, channel_axis = codes.T, scale.T, 1  # case 2
        attributes = {"axis": channel_axis}
        if site.format.block_size is not None:
            attributes = {"axis": 1 - channel_axis, "block_size": site.format.block_size}
        new = NodeList()
        weight = new.add(
            "DequantizeLinear",
            [
                constant(
                    graph,
                    f"{site.layer}.weight.{site.format.element}",
                    codes.astype(array_type(site.format.stored), copy=False),
                ),
                constant(graph, f"{site.layer}.weight_scale", scale.astype(np.float32, copy=False)),
            ],
            f"{site.layer}/weight_dequantize",
            dtype=ir.DataType.FLOAT,
            attributes=attributes,
        )
        graph.insert_before(node, new.nodes)
        node.replace_input_with(1, weight)


def _is_transposed(node: ir.Node) -> bool:
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return transposed is None or transposed.as_int() == 0
    return node.op_type == "MatMul"
