"""Smoothing: an activation's channels are brought to one range before they share a scale.

    X W = (X / f) (f W)         f > 0, one factor per input channel, the same at every step

SmoothQuant (Xiao et al., 2023) folds the division into the layer before and can smooth only where that is possible.
Here it can be any layer's input, for a tensor with one scale per step passes a product anyway
(`passes/timestep_scales.py`), and that product takes the factors along.

In torch a layer's weight is multiplied once, and the division is a hook that comes before its quantizer. A site's
factors are the tensor `<site>.smoothing`, f32 [C], of a quantized checkpoint; a site without it is not smoothed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdq_export.quantspec import QuantSpec

__all__ = ["INVERSE", "divide_inputs_", "smooth_", "smoothed_sites", "smoothing_key"]

#: Name of the buffer 1/f of a smoothed layer, shaped to multiply its input; the exporter keeps it.
INVERSE = "inverse_smoothing"


def smoothing_key(site_name: str) -> str:
    """Key of an activation site's factors, f32 [C]."""
    return f"{site_name}.smoothing"


def smoothed_sites(spec: QuantSpec, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the activation sites that `tensors` has factors for."""
    return tuple(site.name for site in spec.activations if smoothing_key(site.name) in tensors)


@torch.no_grad()
def smooth_(denoiser: nn.Module, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Smooth, in place, the layers that read a site with factors; the denoiser computes what it did.

    Args:
        denoiser: its layer paths are those of `spec`.
        spec: the sites.
        tensors: factors by `smoothing_key`, f32 [C] positive; other tensors are not read.
    """
    for layer, factors in _smoothed_layers(spec, tensors):
        weight = denoiser.get_parameter(f"{layer}.weight")
        weight.mul_(factors.to(weight).reshape(1, -1, *[1] * (weight.ndim - 2)))
    return divide_inputs_(denoiser, spec, tensors)


@torch.no_grad()
def divide_inputs_(denoiser: nn.Module, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The half of `smooth_` that a graph is captured with: the divisions; the weights stay as they are."""
    for layer, factors in _smoothed_layers(spec, tensors):
        module = denoiser.get_submodule(layer)
        inverse = 1 / factors.to(denoiser.get_parameter(f"{layer}.weight"))
        module.register_buffer(INVERSE, inverse.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else inverse)
        module.register_forward_pre_hook(_divide)
    return denoiser


def _smoothed_layers(spec: QuantSpec, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each smoothed layer's path, and its factors, f32 [C]."""
    for site in spec.activations:
        if smoothing_key(site.name) in tensors:
            yield from ((layer, tensors[smoothing_key(site.name)]) for layer in site.consumers)


def _divide(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A function of the module, not of a closure: copies of the layer divide by their own factors."""
    return (arguments[0] * getattr(module, INVERSE), *arguments[1:])
