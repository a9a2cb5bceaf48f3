"""Criterion 2: each quantized layer alone, on the very tensors that the graph gave it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_engines.formats import NumberFormat
from sdq_engines.lowering.graph import QuantizedLayer, array_type, quantized_layers
from sdq_export.parity.graphs import GraphRunner, identity_row, step_feeds
from sdq_export.parity.samples import TeacherSamples
from sdq_export.quantspec import QuantSpec
from sdq_export.rounding import code_steps, round_
from sdq_export.sampler.plan import SamplerPlan

__all__ = ["SiteFigures", "measure_sites"]

_LAYERS_AT_ONCE = 32

_CHANCE_TIES = 3
"""x * (s_ref / s_t) / s_ref and x / s_t differ in the last bit, which moves a few values per 100,000 over a rounding
boundary; in a tensor of 2,000 elements one such value alone would be a share of 5e-4, so this many are not counted."""


@dataclass(frozen=True)
class SiteFigures:
    """The worst of all sites at one step.

    Attributes:
        off_by_one: share of integers that differ from the reference's, the first `_CHANCE_TIES` not counted.
        largest_difference: of two integers.
        output_error: relative L2 distance of a layer's output from torch's on the same integers.
        worst_layer: where ``output_error`` was found.
        worst_site: where ``off_by_one`` was found.
    """

    off_by_one: float
    largest_difference: int
    output_error: float
    worst_layer: str
    worst_site: str


@dataclass(frozen=True)
class _Probe:
    """Graph tensors around one layer."""

    layer: str
    source: str
    """What the site quantizes, as the layer before left it."""
    integers: str | None
    result: str
    """The operator's result, the second product of per-step scales included."""
    has_bias: bool


def measure_sites(
    denoiser: ir.Model,
    prologue: ir.Model,
    plan: SamplerPlan,
    samples: TeacherSamples,
    reference: nn.Module,
    spec: QuantSpec,
    scales: dict[str, NDArray[np.float32]],
    steps: list[int],
) -> list[SiteFigures]:
    """Compare every site at every step of ``steps``.

    Args:
        denoiser: the quantized whole-step graph; it is not changed.
        prologue: what depends on the prompts alone.
        plan: the sampler.
        samples: where to look.
        reference: the fake-quantized StepDenoiser.
        spec: the sites.
        scales: per-step scales [T] by site name.
        steps: which steps.
    """
    figures: dict[int, list[SiteFigures]] = {step: [] for step in steps}
    for probes, model in _exposed(denoiser):
        runner = GraphRunner(model, prologue, plan, samples.conditioning, samples.extra)
        row = identity_row(plan.slots)
        for step in steps:
            inputs = samples.model_inputs[step].numpy()
            found = runner.run(step_feeds(plan, inputs, step, samples.guidance_scale, row))
            figures[step] += [_compare(probe, found, reference, spec, scales, step) for probe in probes]
    return [_worst(figures[step]) for step in steps]


def _exposed(denoiser: ir.Model) -> Iterator[tuple[list[_Probe], ir.Model]]:
    """Copies of the graph that also put out the tensors around some of the layers."""
    names = [layer.name for layer in quantized_layers(denoiser)]
    for start in range(0, len(names), _LAYERS_AT_ONCE):
        wanted = set(names[start : start + _LAYERS_AT_ONCE])
        model = denoiser.clone()
        probes = [_probe(layer) for layer in quantized_layers(model) if layer.name in wanted]
        values = {value.name: value for node in model.graph for value in node.outputs}
        needed = {name for probe in probes for name in (probe.source, probe.integers, probe.result) if name is not None}
        shown = {value.name for value in model.graph.outputs}
        model.graph.outputs.extend(values[name] for name in sorted(needed - shown))
        yield probes, model


def _probe(layer: QuantizedLayer) -> _Probe:
    node = layer.node
    result = node.outputs[0]
    scaled = [user for user in result.consumers() if user.name == f"{layer.name}/rescale_out"]
    integers = None
    source = node.inputs[0]
    assert source is not None
    dequantize = source.producer()
    if dequantize is not None and dequantize.op_type == "DequantizeLinear":
        quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
        assert quantize is not None
        assert quantize.inputs[0] is not None
        integers, source = quantize.outputs[0].name, quantize.inputs[0]
        rescale = source.producer()
        if rescale is not None and (rescale.name or "").endswith("/rescale_in") and rescale.inputs[0] is not None:
            source = rescale.inputs[0]
    return _Probe(
        layer=layer.name,
        source=source.name or "",
        integers=integers,
        result=(scaled[0].outputs[0] if scaled else result).name or "",
        has_bias=len(node.inputs) > 2 and node.inputs[2] is not None,
    )


def _compare(
    probe: _Probe,
    found: dict[str, NDArray[Any]],
    reference: Any,
    spec: QuantSpec,
    scales: dict[str, NDArray[np.float32]],
    step: int,
) -> SiteFigures:
    module = reference.model.get_submodule(probe.layer)
    site = spec.activation_of.get(probe.layer)
    source = torch.from_numpy(found[probe.source])
    if site is None or probe.integers is None:
        share, largest, inputs = 0.0, 0, source
    else:
        scale = float(scales[site.name][step])
        codes = _codes(found[probe.integers], site.format)
        wanted = round_(source / scale, site.format)
        difference = (code_steps(codes, site.format) - code_steps(wanted, site.format)).abs()
        beyond_chance = max(0, int((difference > 0).sum()) - _CHANCE_TIES)
        share, largest = beyond_chance / difference.numel(), int(difference.max())
        inputs = codes * scale
    expected = _apply(module, inputs, probe.has_bias)
    result = torch.from_numpy(found[probe.result])
    error = float((result - expected).norm() / expected.norm().clamp_min(1e-12))
    return SiteFigures(share, largest, error, probe.layer, probe.layer)


def _codes(found: NDArray[Any], format: NumberFormat) -> Tensor:
    """What a QuantizeLinear put out, FP32; ONNX Runtime hands FP8 over as the bytes that it is made of."""
    if format.kind == "float":
        found = found.view(array_type(format.array_type))
    return torch.from_numpy(found.astype(np.float32))


def _apply(module: nn.Module, inputs: Tensor, has_bias: bool) -> Tensor:
    """The layer's product, without its hooks, with its bias only where the graph's operator has it too."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    bias = module.bias if has_bias and isinstance(module.bias, Tensor) else None
    with torch.no_grad():
        if isinstance(module, nn.Conv2d):
            return module._conv_forward(inputs, weight, bias)
        return nn.functional.linear(inputs, weight, bias)


def _worst(figures: list[SiteFigures]) -> SiteFigures:
    by_integers = max(figures, key=lambda each: (each.largest_difference > 1, each.off_by_one))
    by_output = max(figures, key=lambda each: each.output_error)
    return SiteFigures(
        off_by_one=max(each.off_by_one for each in figures),
        largest_difference=max(each.largest_difference for each in figures),
        output_error=by_output.output_error,
        worst_layer=by_output.worst_layer,
        worst_site=by_integers.worst_site,
    )
