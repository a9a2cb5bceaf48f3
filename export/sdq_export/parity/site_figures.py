"""Figures of criterion 2: each quantized layer of the graph alone, on the very tensors that the reference gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdq_engines.backends.onnxruntime import open_session
from sdq_engines.formats import NumberFormat
from sdq_engines.lowering.graph import QuantizedLayer, array_type, quantized_layers
from sdq_export.parity.graphs import GraphFile
from sdq_export.parity.reference import answer
from sdq_export.parity.samples import TeacherSamples
from sdq_export.quantspec import QuantSpec
from sdq_export.reference import Reference
from sdq_export.rounding import code_steps, round_

__all__ = ["SiteFigures", "measure_sites"]

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


def measure_sites(
    denoiser: GraphFile,
    samples: TeacherSamples,
    reference: Reference,
    spec: QuantSpec,
    scales: Mapping[str, NDArray[np.float32]],
    steps: Sequence[int],
) -> list[SiteFigures]:
    """Compare every site at every step of ``steps``.

    The reference runs once a step. What it gives a layer is given to the layer's own part of the graph as well, from
    the site's tensor to the operator's product, in a session of its own: all layers cost about one more run, and
    memory for one layer.

    Args:
        denoiser: the quantized whole-step graph.
        samples: where to look.
        reference: the fake-quantized denoiser.
        spec: the sites.
        scales: per-step scales [T] by site name.
        steps: which steps.
    """
    model = ir.load(denoiser.path)
    layers = [_part(model, layer) for layer in quantized_layers(model)]
    return [_at_step(layers, samples, reference, spec, scales, step) for step in steps]


def _at_step(
    layers: Sequence[_Part],
    samples: TeacherSamples,
    reference: Reference,
    spec: QuantSpec,
    scales: Mapping[str, NDArray[np.float32]],
    step: int,
) -> SiteFigures:
    figures: list[SiteFigures] = []

    def hear(part: _Part, x: Tensor) -> None:
        figures.append(_compare(part, x, reference, spec, scales, step))

    with _listening(reference, spec, layers, hear):
        answer(reference, samples, step)
    return _worst(figures)


@dataclass(frozen=True)
class _Part:
    """A layer's part of the graph."""

    model: ir.Model
    layer: str
    source: ir.Value
    """What the site quantizes, as the layer before left it."""
    integers: ir.Value | None
    result: ir.Value
    """The operator's result, the second product of per-step scales included."""
    has_bias: bool

    def session(self) -> Any:
        """The part alone, opened in ONNX Runtime: inputs `source` and, of per-step scales, `step`."""
        outputs = [self.result] if self.integers is None else [self.result, self.integers]
        nodes, constants, inputs = _between(self.source, outputs)
        opsets = self.model.graph.opset_imports
        view = ir.GraphView(inputs, outputs, nodes=nodes, initializers=constants, opset_imports=opsets, name=self.layer)
        model = ir.external_data.load_to_model(ir.Model(view.clone(), ir_version=self.model.ir_version))
        return open_session(ir.to_proto(model).SerializeToString(), threads=torch.get_num_threads())


def _part(model: ir.Model, layer: QuantizedLayer) -> _Part:
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
        integers, source = quantize.outputs[0], quantize.inputs[0]
        rescale = source.producer()
        if rescale is not None and (rescale.name or "").endswith("/rescale_in") and rescale.inputs[0] is not None:
            source = rescale.inputs[0]
    return _Part(
        model=model,
        layer=layer.name,
        source=source,
        integers=integers,
        result=scaled[0].outputs[0] if scaled else result,
        has_bias=len(node.inputs) > 2 and node.inputs[2] is not None,
    )


def _between(source: ir.Value, outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value]]:
    """The nodes that make the outputs of `source`, in order, the constants that they read, and the graph's inputs."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[ir.Value, None] = {}
    inputs: dict[ir.Value, None] = {source: None}

    def visit(value: ir.Value | None) -> None:
        if value is None or value in inputs or value in constants:
            return
        producer = value.producer()
        if producer is None:
            (constants if value.is_initializer() else inputs)[value] = None
        elif producer not in nodes:
            for each in producer.inputs:
                visit(each)
            nodes[producer] = None

    for output in outputs:
        visit(output)
    return list(nodes), list(constants), list(inputs)


@contextmanager
def _listening(
    reference: Reference, spec: QuantSpec, parts: Sequence[_Part], hear: Callable[[_Part, Tensor], None]
) -> Iterator[None]:
    """Hear of each layer, while the reference runs, the tensor that its site quantizes, or that it reads."""
    quantized: dict[str, Tensor] = {}
    handles = []
    for name, quantizer in reference.quantizers.items():

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor, name: str = name) -> None:
            quantized[name] = inputs[0]

        handles.append(quantizer.register_forward_hook(keep))
    for part in parts:
        site = spec.activation_of.get(part.layer)

        def tell(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor, part: _Part = part, site: Any = site) -> None:
            hear(part, inputs[0] if site is None else quantized[site.name])

        handles.append(reference.model.get_submodule(part.layer).register_forward_hook(tell))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    part: _Part,
    source: Tensor,
    reference: Reference,
    spec: QuantSpec,
    scales: Mapping[str, NDArray[np.float32]],
    step: int,
) -> SiteFigures:
    module = reference.model.get_submodule(part.layer)
    site = spec.activation_of.get(part.layer)
    found = _run(part, source, step)
    result = torch.from_numpy(found[0])
    if site is None or part.integers is None:
        share, largest, inputs = 0.0, 0, source
    else:
        scale = float(scales[site.name][step])
        codes = _codes(found[1], site.format)
        wanted = round_(source.cpu() / scale, site.format)
        difference = (code_steps(codes, site.format) - code_steps(wanted, site.format)).abs()
        beyond_chance = max(0, int((difference > 0).sum()) - _CHANCE_TIES)
        share, largest = beyond_chance / difference.numel(), int(difference.max())
        inputs = codes * scale
    expected = _apply(module, inputs.to(module.weight.device), part.has_bias).cpu()
    error = float((result - expected).norm() / expected.norm().clamp_min(1e-12))
    return SiteFigures(share, largest, error, part.layer, part.layer)


def _run(part: _Part, source: Tensor, step: int) -> list[NDArray[Any]]:
    session = part.session()
    feeds = {
        item.name: source.cpu().numpy() if item.name == part.source.name else np.asarray(step, np.int64)
        for item in session.get_inputs()
    }
    outputs: list[NDArray[Any]] = session.run(None, feeds)
    return outputs


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
