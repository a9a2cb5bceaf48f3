"""The student: the denoiser with learned quantizers, its parameter groups, and its state as checkpoint tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Fit
from sdq_deploy.training.modelopt_backend import activation_quantizers, insert_quantizers, weight_quantizers
from sdq_export.checkpoint import quantize_weight, scale_key, weight_key, weight_scale_key
from sdq_export.quantspec import QuantSpec
from sdq_export.smoothing import smooth_, smoothed_sites, smoothing_key
from sdq_export.stepping import StepDenoiser

__all__ = ["Student", "parameter_groups"]


class Student:
    """A StepDenoiser whose sites carry learned quantizers.

    Args:
        original: the floating-point denoiser; copied.
        timesteps: [T], the timestep of each step.
        spec: the sites.
        scales: initial scales under their checkpoint keys, and the factors of smoothed sites.
    """

    def __init__(self, original: nn.Module, timesteps: Tensor, spec: QuantSpec, scales: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.factors = {
            smoothing_key(name): scales[smoothing_key(name)].float() for name in smoothed_sites(spec, scales)
        }
        self.denoiser = StepDenoiser(smooth_(copy.deepcopy(original), spec, self.factors), timesteps)
        insert_quantizers(self.denoiser, spec, scales)
        self.denoiser.eval().requires_grad_(True)
        self.weight_quantizers = weight_quantizers(self.denoiser, spec)
        self.activation_quantizers = activation_quantizers(self.denoiser, spec)

    def weight(self, layer: str) -> nn.Parameter:
        """The floating-point weight that training moves (not its fake-quantized value)."""
        # Through _parameters: modelopt makes `.weight` the quantized value inside a forward.
        parameter: nn.Parameter = self.denoiser.model.get_submodule(layer)._parameters["weight"]
        return parameter

    def rounded_weight(self, layer: str) -> Tensor:
        """The floating-point weight that the quantizer rounds: what training moves, an adapter's share included."""
        quantizer = self.weight_quantizers[layer]
        merged: Tensor = quantizer.lsq.before_rounding(self.weight(layer), quantizer)
        return merged

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What adapters add to the weights; nothing where there are none."""
        return [
            parameter
            for quantizer in self.weight_quantizers.values()
            for name, parameter in quantizer.named_parameters()
            if name.startswith("adapter_")
        ]

    def weight_scale(self, layer: str) -> Tensor:
        """The layer's scales, f32 [C_out] or [C_out, blocks]."""
        scale: Tensor = self.weight_quantizers[layer].log_scale.exp()
        return scale

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The student as tensors of a quantized checkpoint, on the CPU."""
        integers, scales = {}, {}
        for site in self.spec.weights:
            scale = self.weight_scale(site.layer)
            integers[weight_key(site.layer)] = quantize_weight(self.rounded_weight(site.layer), scale, site)
            scales[weight_scale_key(site.layer)] = scale
        for name, quantizer in self.activation_quantizers.items():
            scales[scale_key(name)] = quantizer.log_scale.exp()
        others = {
            name: parameter
            for name, parameter in self.denoiser.model.named_parameters()
            if name not in integers and "_quantizer." not in name
        }
        return {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in {**others, **integers, **scales, **self.factors}.items()
        }

    @contextmanager
    def only(self, layers: Iterable[str]) -> Iterator[None]:
        """Quantize these layers alone, their weights and inputs, for the length of the block."""
        every = [*self.weight_quantizers.values(), *self.activation_quantizers.values()]
        wanted = set(layers)
        inputs = {site.name for site in self.spec.activations if wanted & set(site.consumers)}
        chosen = [self.weight_quantizers[layer] for layer in wanted]
        chosen += [self.activation_quantizers[name] for name in inputs]
        for quantizer in every:
            quantizer.disable()
        for quantizer in chosen:
            quantizer.enable()
        try:
            yield
        finally:
            for quantizer in every:
                quantizer.enable()


def parameter_groups(student: Student, fit: Fit) -> list[dict[str, Any]]:
    """AdamW groups: weights by their bits, weight scales by their bits, activation scales, everything else.

    Scales have their own learning rates and no weight decay; a parameter that is not quantized follows the lowest
    bits in use, whose rate is the larger. `peak_lr` is the rate that the schedule scales.
    """
    bits_of = {site.layer: site.format.bits for site in student.spec.weights}
    lowest = min(bits_of.values(), default=8)
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    names: dict[tuple[float, float], str] = {}
    for name, parameter in student.denoiser.model.named_parameters():
        kind, rate, decay = _rate_of(name, bits_of, lowest, fit)
        grouped.setdefault((rate, decay), []).append(parameter)
        names.setdefault((rate, decay), kind)
    return [
        {"params": params, "lr": key[0], "peak_lr": key[0], "weight_decay": key[1], "name": names[key]}
        for key, params in grouped.items()
    ]


def _rate_of(name: str, bits_of: Mapping[str, int], lowest: int, fit: Fit) -> tuple[str, float, float]:
    if name.endswith(".weight_quantizer.log_scale"):
        bits = bits_of[name.removesuffix(".weight_quantizer.log_scale")]
        return f"weight scales, {bits} bits", fit.weight_scale_lr.of(bits), 0.0
    if name.endswith(".input_quantizer.log_scale"):
        return "activation scales", fit.activation_scale_lr, 0.0
    layer, _, part = name.rpartition(".")
    bits = bits_of.get(layer, lowest)
    decay = fit.weight_decay if part == "weight" and layer in bits_of else 0.0
    return f"weights, {bits} bits", fit.weight_lr.of(bits), decay
