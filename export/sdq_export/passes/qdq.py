"""Activations with one scale: plain QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_engines.formats import NumberFormat
from sdq_engines.lowering.graph import array_type, quantized_layers
from sdq_export.checkpoint import scale_key
from sdq_export.graph import NodeList, constant
from sdq_export.quantspec import ActivationSite

__all__ = ["QuantizeActivations", "SiteInputs", "quantize_dequantize"]


class QuantizeActivations(ir.passes.InPlacePass):
    """Insert Q and DQ with a constant scale before the consumers of each site that has a single scale group.

    One Q and one DQ serve all consumers of a site. Biases stay where they are.

    Requires: the consumers of a site read the same tensor.
    Ensures: they read its DequantizeLinear.

    Args:
        sites: activation sites of one scale group each.
        tensors: scales by the keys of `sdq_export.checkpoint`.
    """

    def __init__(self, sites: Sequence[ActivationSite], tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.sites = sites
        self.tensors = tensors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert in place."""
        inputs = SiteInputs(model)
        for site in self.sites:
            consumers, source = inputs.of(site)
            new = NodeList()
            scale = np.asarray(self.tensors[scale_key(site.name)], np.float32).reshape(())
            dequantized = quantize_dequantize(model.graph, new, source, scale, site.format, site.consumers[0])
            model.graph.insert_before(consumers[0], new.nodes)
            for node in consumers:
                node.replace_input_with(0, dequantized)
        return ir.passes.PassResult(model, modified=bool(self.sites))

    def requires(self, model: ir.Model) -> None:
        """Every site is one tensor."""
        inputs = SiteInputs(model)
        for site in self.sites:
            inputs.of(site)

    def ensures(self, model: ir.Model) -> None:
        """Every consumer reads quantized values."""
        consumers = {layer for site in self.sites for layer in site.consumers}
        for layer in quantized_layers(model):
            if layer.name in consumers:
                source = layer.node.inputs[0]
                producer = source.producer() if source is not None else None
                if producer is None or producer.op_type != "DequantizeLinear":
                    raise ir.passes.PostconditionError(f"{layer.name} does not read a DequantizeLinear")


class SiteInputs:
    """The operators of a graph's quantized layers, looked for once: which of them consume a site, and what they read.

    Args:
        model: its layers may be given other inputs meanwhile, but no layer may come or go.
    """

    def __init__(self, model: ir.Model) -> None:
        self._order = {layer.name: (place, layer.node) for place, layer in enumerate(quantized_layers(model))}

    def of(self, site: ActivationSite) -> tuple[list[ir.Node], ir.Value]:
        """The operators that consume a site, in graph order, and the one tensor that they read.

        Raises:
            PreconditionError: a consumer is missing or reads another tensor.
        """
        found = sorted((self._order[name] for name in site.consumers if name in self._order), key=lambda each: each[0])
        consumers = [node for _, node in found]
        if len(consumers) != len(site.consumers):
            raise ir.passes.PreconditionError(
                f"{site.name}: {len(site.consumers)} consumers wanted, {len(consumers)} found"
            )
        source = consumers[0].inputs[0]
        if source is None or any(node.inputs[0] is not source for node in consumers):
            raise ir.passes.PreconditionError(
                f"{site.name}: its consumers {site.consumers} do not read the same tensor"
            )
        return consumers, source


def quantize_dequantize(
    graph: ir.Graph, new: NodeList, source: ir.Value, scale: NDArray[np.float32], format: NumberFormat, layer: str
) -> ir.Value:
    """Add Q and DQ of ``source`` with a constant scalar scale and zero point 0, named after ``layer``.

    The zero point's type is the codes'. Of a float format ONNX clips what is beyond its limits (attribute `saturate`,
    by default on).
    """
    zero = constant(graph, f"zero_{format.element}", np.zeros((), array_type(format.array_type)))
    stored = constant(graph, f"{layer}.input_scale", scale)
    quantized = new.add(
        "QuantizeLinear", [source, stored, zero], f"{layer}/quantize", dtype=ir.DataType[format.onnx_type]
    )
    return new.add(
        "DequantizeLinear",
        [quantized, stored, zero],
        f"{layer}/dequantize",
        dtype=ir.DataType.FLOAT,
        shape=source.shape,
    )
