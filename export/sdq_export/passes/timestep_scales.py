"""Activations with one scale per step, in the form that every engine's compiler takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sdq_engines.errors import SdqError
from sdq_export.checkpoint import scale_key
from sdq_export.graph import NodeList, array_of, constant, insert_after, module_of, rename
from sdq_export.passes.qdq import QuantizeActivations, SiteInputs, quantize_dequantize
from sdq_export.passes.time_tables import STEP_INPUT
from sdq_export.quantspec import ActivationSite

__all__ = ["RATIO_LIMIT", "TimestepScales", "reference_scale"]

RATIO_LIMIT = 512.0
"""Largest s_t/s_ref and s_ref/s_t: with it an FP16 result of ordinary size (0.03 to 128) stays a normal FP16 number."""

_FP16_SMALLEST_SCALE = 2.0**-13
_FP16_LARGEST_SCALE = 65504.0 / 128.0


class TimestepScales(ir.passes.InPlacePass):
    """Quantize the sites whose scale depends on the step (MTAQ), with constant Q/DQ scales.

    TensorRT wants a constant Q/DQ scale, and OpenVINO loses its INT8 kernels without one. s_t being a scalar, this is
    the exact equivalent (docs/quantization.md, "Per-step scales that survive the compiler"):

        y = (s_t/s_ref) * op( DQ( Q( x * (s_ref/s_t) ) ), DQ(w) ) + b_t          Q and DQ with the constant scale s_ref

    The two ratios are looked up by the graph input ``step`` in float32 tables [T].

    Cases, for what is behind the operator:
    1. a Conv with its own bias: the bias moves behind the second product;
    2. an operator whose bias (or time row) is an Add of its own: it is behind the product already.

    Requires: the graph has the input ``step``; the consumers of a site read the same tensor.
    Ensures: the consumers read a DequantizeLinear.

    Args:
        sites: activation sites of several scale groups.
        tensors: scales by the keys of `sdq_export.checkpoint`.
    """

    def __init__(self, sites: Sequence[ActivationSite], tensors: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.sites = sites
        self.tensors = tensors

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert in place."""
        step = next(value for value in model.graph.inputs if value.name == STEP_INPUT)
        inputs = SiteInputs(model)
        for site in self.sites:
            self._insert(model.graph, site, inputs, step)
        return ir.passes.PassResult(model, modified=bool(self.sites))

    def requires(self, model: ir.Model) -> None:
        """There is a step, and every site is one tensor."""
        if not any(value.name == STEP_INPUT for value in model.graph.inputs):
            raise ir.passes.PreconditionError(f"the graph has no input {STEP_INPUT}")
        inputs = SiteInputs(model)
        for site in self.sites:
            inputs.of(site)

    def ensures(self, model: ir.Model) -> None:
        """Every consumer reads quantized values."""
        QuantizeActivations(self.sites, self.tensors).ensures(model)

    def _insert(self, graph: ir.Graph, site: ActivationSite, inputs: SiteInputs, step: ir.Value) -> None:
        first = site.consumers[0]
        consumers, source = inputs.of(site)
        per_step = np.asarray(self.tensors[scale_key(site.name)], np.float32)[list(site.groups)]
        reference = reference_scale(per_step)
        _check_ratios(site, per_step, reference)
        new = NodeList()
        in_table = constant(graph, f"{first}.in_ratio", (reference / per_step).astype(np.float32))
        out_table = constant(graph, f"{first}.out_ratio", (per_step / reference).astype(np.float32))
        in_ratio = new.add("Gather", [in_table, step], f"{first}/in_ratio", shape=[])
        out_ratio = new.add("Gather", [out_table, step], f"{first}/out_ratio", shape=[])
        scaled = new.add("Mul", [source, in_ratio], f"{first}/rescale_in")
        dequantized = quantize_dequantize(graph, new, scaled, np.asarray(reference, np.float32), site.format, first)
        graph.insert_before(consumers[0], new.nodes)
        for node in consumers:
            node.replace_input_with(0, dequantized)
            _rescale(graph, node, out_ratio)


def reference_scale(per_step: NDArray[np.float32]) -> float:
    """s_ref: the geometric mean of the steps' scales, kept where an FP16 engine can hold it as a normal number.

    Not 1, because an engine may emit FP16 before the second product: with the mean, that product is near 1.
    """
    mean = float(np.exp(np.mean(np.log(per_step.astype(np.float64)))))
    return min(max(mean, _FP16_SMALLEST_SCALE), _FP16_LARGEST_SCALE)


def _check_ratios(site: ActivationSite, per_step: NDArray[np.float32], reference: float) -> None:
    if not np.all(np.isfinite(per_step) & (per_step > 0)):
        raise SdqError(f"The scales of {site.name} are not all positive numbers.", "Train it again.")
    worst = float(max(np.max(per_step) / reference, reference / np.min(per_step)))
    if worst > RATIO_LIMIT:
        raise SdqError(
            f"The scales of {site.name} span a factor of {worst:.0f} around their mean; "
            f"an FP16 engine can follow {RATIO_LIMIT:.0f}.",
            "Keep the layer in floating point (recipe: keep), or give it fewer scale groups.",
        )


def _rescale(graph: ir.Graph, node: ir.Node, out_ratio: ir.Value) -> None:
    """Put the second product, and a bias that was inside the operator, behind it."""
    layer = node.metadata_props["sdq.layer"]
    following = list(node.outputs[0].consumers())
    new = NodeList()
    value = new.add("Mul", [node.outputs[0], out_ratio], f"{layer}/rescale_out")
    if len(node.inputs) > 2 and node.inputs[2] is not None:  # case 1
        bias = array_of(node.inputs[2])
        spread = bias.reshape(-1, 1, 1) if node.op_type == "Conv" else bias
        new.add("Add", [value, constant(graph, f"{layer}.bias_after", spread)], f"{layer}/add_bias")
        node.resize_inputs(2)
    elif len(following) == 1 and following[0].op_type == "Add" and module_of(following[0]) == module_of(node):
        rename(following[0], f"{layer}/add_bias")  # case 2
    insert_after(graph, node, new)
