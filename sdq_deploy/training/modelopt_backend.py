"""The student's quantizers: nvidia-modelopt's, carrying our learned scales (docs/architecture.md, "Training").

`mtq.quantize` places a quantizer at exactly the sites of a QuantSpec; a registered quantization backend runs the LSQ
forward. A scale is an `nn.Parameter` on its quantizer, as its logarithm, so that it stays positive. Layers that read
one activation site hold the same quantizer module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from sdq_deploy.training.lsq import broadcast_scale, fake_quantize_lsq, sample_scale, step_gradient_scale
from sdq_engines.formats import NumberFormat
from sdq_export.quantspec import ActivationSite, QuantSpec, WeightSite
from sdq_export.rounding import stored_dtype
from sdq_export.step_state import StepState
from sdq_export.stepping import StepDenoiser

__all__ = [
    "BACKEND",
    "WeightForward",
    "activation_quantizers",
    "import_modelopt",
    "insert_quantizers",
    "modelopt_bits",
    "only_conv_and_linear",
    "weight_quantizers",
]

#: Name under which modelopt's TensorQuantizer finds our forward.
BACKEND = "sdq-lsq"


class _Forward(Protocol):
    def __call__(self, x: Tensor, quantizer: Any) -> Tensor: ...


@dataclass(frozen=True)
class WeightForward:
    """Fake quantization of a weight: one scale per output channel, or per block along a Linear's input."""

    format: NumberFormat

    def before_rounding(self, x: Tensor, quantizer: Any) -> Tensor:
        """What is rounded: the weight as it is."""
        return x

    def __call__(self, x: Tensor, quantizer: Any) -> Tensor:
        scale = quantizer.log_scale.exp()
        block = self.format.block_size
        if block is None:
            elements = x.numel() // x.shape[0]
            gradient_scale = step_gradient_scale(elements, self.format)
            return fake_quantize_lsq(x, broadcast_scale(scale, x.ndim), self.format, gradient_scale)
        blocks = x.reshape(x.shape[0], -1, block)
        gradient_scale = step_gradient_scale(block, self.format)
        return fake_quantize_lsq(blocks, scale[:, :, None], self.format, gradient_scale).reshape(x.shape)


@dataclass(frozen=True)
class ActivationForward:
    """Fake quantization of an activation: each sample by the scale of its own step's group."""

    format: NumberFormat
    state: StepState

    def __call__(self, x: Tensor, quantizer: Any) -> Tensor:
        scale = sample_scale(quantizer.log_scale, quantizer.groups, self.state.steps, x.ndim).exp()
        return fake_quantize_lsq(x, scale, self.format, step_gradient_scale(x[0].numel(), self.format))


def _entrypoint(x: Tensor, quantizer: Any) -> Tensor:
    forward = cast(_Forward, quantizer.lsq)
    return forward(x, quantizer)


def import_modelopt() -> Any:
    """modelopt's quantization module, imported without its chatter about versions of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("modelopt").setLevel(logging.ERROR)
        import modelopt.torch.quantization as mtq
    return mtq


@contextlib.contextmanager
def only_conv_and_linear() -> Iterator[None]:
    """Have modelopt replace Conv2d and Linear only.

    Its replacement of diffusers' Attention has no backward, even with its quantizers off, and a `*input_quantizer`
    would sit on norms. The registry is global, so it is put back.
    """
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    registry: dict[type, Any] = QuantModuleRegistry._registry
    before = dict(registry)
    for kind in before:
        if kind not in (nn.Conv2d, nn.Linear):
            del registry[kind]
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def insert_quantizers(denoiser: StepDenoiser, spec: QuantSpec, scales: Mapping[str, Tensor]) -> None:
    """Put quantizers at the sites of `spec`, in place, with their scales as parameters.

    Args:
        denoiser: floating-point; its layers are replaced by modelopt's quantized ones, weights shared.
        spec: the sites; layer paths are those of `denoiser.model`.
        scales: FP32, `<layer>.weight_scale` and `<site name>.scale`, shaped as in the quantized checkpoint.
    """
    mtq = import_modelopt()
    from modelopt.torch.quantization.nn import is_registered_quant_backend, register_quant_backend

    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _entrypoint)
    with only_conv_and_linear(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(denoiser.model, {"quant_cfg": _quantizer_config(spec), "algorithm": None})
    for weight in spec.weights:
        _attach_weight(denoiser, weight, scales[f"{weight.layer}.weight_scale"])
    for activation in spec.activations:
        _attach_activation(denoiser, activation, scales[f"{activation.name}.scale"])


def modelopt_bits(format: NumberFormat) -> int | tuple[int, int]:
    """The format as modelopt names it: bits of an integer, (exponent, mantissa) bits of a float."""
    if format.kind == "integer":
        return format.bits
    mantissa = round(-math.log2(torch.finfo(stored_dtype(format)).eps))
    return format.bits - 1 - mantissa, mantissa


def _quantizer_config(spec: QuantSpec) -> list[dict[str, Any]]:
    """Everything off, then one entry per site by its full name."""
    config: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    config += [
        {
            "quantizer_name": f"{site.layer}.weight_quantizer",
            "cfg": {"num_bits": modelopt_bits(site.format), "axis": 0, "backend": BACKEND},
        }
        for site in spec.weights
    ]
    config += [
        {
            "quantizer_name": f"{layer}.input_quantizer",
            "cfg": {"num_bits": modelopt_bits(site.format), "backend": BACKEND},
        }
        for site in spec.activations
        for layer in site.consumers
    ]
    return config


def _attach_weight(denoiser: StepDenoiser, site: WeightSite, scale: Tensor) -> None:
    quantizer: Any = denoiser.model.get_submodule(f"{site.layer}.weight_quantizer")
    quantizer.log_scale = nn.Parameter(scale.detach().float().log())
    quantizer.lsq = WeightForward(site.format)


def _attach_activation(denoiser: StepDenoiser, site: ActivationSite, scale: Tensor) -> None:
    first, *others = site.consumers
    quantizer: Any = denoiser.model.get_submodule(f"{first}.input_quantizer")
    quantizer.log_scale = nn.Parameter(scale.detach().float().log())
    quantizer.register_buffer("groups", torch.tensor(site.groups), persistent=False)
    quantizer.lsq = ActivationForward(site.format, denoiser.state)
    for layer in others:
        denoiser.model.get_submodule(layer).input_quantizer = quantizer


def weight_quantizers(denoiser: StepDenoiser, spec: QuantSpec) -> dict[str, Any]:
    """Layer -> its weight quantizer, whose `log_scale` is learned."""
    return {site.layer: denoiser.model.get_submodule(f"{site.layer}.weight_quantizer") for site in spec.weights}


def activation_quantizers(denoiser: StepDenoiser, spec: QuantSpec) -> dict[str, Any]:
    """Site name -> the activation quantizer that its consumers share."""
    return {
        site.name: denoiser.model.get_submodule(f"{site.consumers[0]}.input_quantizer") for site in spec.activations
    }
