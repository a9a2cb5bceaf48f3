"""One division for all layers that read a smoothed tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sdq_export.graph import array_of, layers_of, rename
from sdq_export.passes.clean_up import RemoveDeadCode
from sdq_export.quantspec import ActivationSite
from sdq_export.smoothing import INVERSE

__all__ = ["ShareSmoothing"]


class ShareSmoothing(ir.passes.InPlacePass):
    """Let the consumers of a smoothed site read one product.

    In torch each layer divides for itself (`sdq_export.smoothing`), so query, key and value come with three equal
    products of one tensor; a site is one tensor.

    Requires: each consumer reads a Mul by its constant ``<layer>.inverse_smoothing``, of the same tensor and value.
    Ensures: the consumers of a site read the same tensor.

    Args:
        sites: the smoothed activation sites.
    """

    def __init__(self, sites: Sequence[ActivationSite]) -> None:
        super().__init__()
        self.sites = sites

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        layers = layers_of(model)
        for site in self.sites:
            first = _product(layers[site.consumers[0]])
            rename(first, f"{site.consumers[0]}/smooth")
            for layer in site.consumers[1:]:
                layers[layer].replace_input_with(0, first.outputs[0])
        RemoveDeadCode()(model)
        return ir.passes.PassResult(model, modified=bool(self.sites))

    def requires(self, model: ir.Model) -> None:
        """All products of a site are the same."""
        layers = layers_of(model)
        for site in self.sites:
            products = [_product(layers[layer]) for layer in site.consumers]
            same = all(
                product.inputs[0] is products[0].inputs[0]
                and np.array_equal(array_of(product.inputs[1]), array_of(products[0].inputs[1]))
                for product in products
            )
            if not same:
                raise ir.passes.PreconditionError(f"{site.name}: its consumers are not smoothed alike")


def _product(layer: ir.Node) -> ir.Node:
    source = layer.inputs[0]
    node = source.producer() if source is not None else None
    factors = node.inputs[1] if node is not None and node.op_type == "Mul" else None
    if node is None or factors is None or not (factors.name or "").endswith(INVERSE):
        raise ir.passes.PreconditionError(f"{layer.name} does not read a smoothed tensor")
    return node
