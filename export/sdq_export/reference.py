"""The reference: a fake-quantized denoiser in pure torch, built from a quantized checkpoint alone.

Export checks its graphs against it and evaluation compares with it. Nothing of ModelOpt is in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.checkpoint import dequantize_weight, scale_key, weight_key, weight_scale_key
from sdq_export.quantspec import ActivationSite, QuantSpec
from sdq_export.rounding import fake_quantize
from sdq_export.smoothing import smooth_, smoothing_key
from sdq_export.step_state import StepState
from sdq_export.stepping import StepDenoiser

__all__ = ["ActivationQuantizer", "Reference", "build_reference"]


class ActivationQuantizer(nn.Module):
    """Fake quantization of one activation site, by the scale of each sample's step.

    Args:
        site: the format and the step's group.
        scale: FP32 [G].
        state: holds the batch's steps.
    """

    per_step: Tensor

    def __init__(self, site: ActivationSite, scale: Tensor, state: StepState) -> None:
        super().__init__()
        self.format, self.state, self.enabled = site.format, state, True
        self.register_buffer("per_step", scale.float()[torch.tensor(site.groups)], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x_hat, in the shape and dtype of x [B, ...]."""
        if not self.enabled:
            return x
        scale = self.per_step[self.state.steps].reshape(-1, *[1] * (x.ndim - 1))
        return fake_quantize(x, scale, self.format).to(x.dtype)


class Reference(StepDenoiser):
    """The torch denoiser that graphs are held against: fake-quantized, or in floating point where it has no quantizers.

    Args:
        model: the source's denoiser; it becomes the reference, and is not to be used again.
        timesteps: [T], the timestep of each step.

    Attributes:
        quantizers: activation site -> its quantizer. They are no submodules, so the denoiser's own names stay; they go
            where it goes.
    """

    def __init__(self, model: nn.Module, timesteps: Tensor) -> None:
        super().__init__(model, timesteps)
        self.quantizers: dict[str, ActivationQuantizer] = {}

    def quantize_inputs(self, site: ActivationSite, scale: Tensor) -> None:
        """Quantize what a site's consumers read, by scales FP32 [G]."""
        self.quantizers[site.name] = quantizer = ActivationQuantizer(site, scale, self.state)
        for layer in site.consumers:
            self.model.get_submodule(layer).register_forward_pre_hook(lambda _, args: (quantizer(args[0]), *args[1:]))

    @contextmanager
    def quantizers_off(self) -> Iterator[None]:
        """Activations in floating point for a block."""
        for quantizer in self.quantizers.values():
            quantizer.enabled = False
        try:
            yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.enabled = True

    def _apply(self, fn: Any, recurse: bool = True) -> Reference:
        """What moves the module (`to`) moves the quantizers too."""
        super()._apply(fn, recurse)
        for quantizer in self.quantizers.values():
            quantizer._apply(fn, recurse)
        return self


def build_reference(
    original: nn.Module, spec: QuantSpec, tensors: Mapping[str, Tensor], timesteps: Tensor
) -> Reference:
    """Build the fake-quantized denoiser of a checkpoint.

    Args:
        original: the source's denoiser; it becomes the reference, and is not to be used again.
        spec: the sites.
        tensors: the checkpoint's, keyed as sdq_export.checkpoint says.
        timesteps: [T], the timestep of each step.

    Returns:
        It in eval mode, without gradients.

    Raises:
        SdqError: the checkpoint lacks a tensor of the denoiser, or has one that the denoiser does not take.
    """
    reference = Reference(smooth_(original, spec, tensors), timesteps)
    model: Any = reference.model
    model.load_state_dict(_kept(model, spec, tensors), strict=False)  # what is precomputed is not in a checkpoint
    with torch.no_grad():
        for layer, site in spec.weight_sites.items():
            module = model.get_submodule(layer)
            module.weight.copy_(dequantize_weight(tensors[weight_key(layer)], tensors[weight_scale_key(layer)], site))
    for activation in spec.activations:
        reference.quantize_inputs(activation, tensors[scale_key(activation.name)])
    reference.eval().requires_grad_(False)
    return reference


def _kept(model: nn.Module, spec: QuantSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are not quantized: each parameter of the denoiser, and nothing that it does not have.

    Raises:
        SdqError: naming what is missing or left over.
    """
    codes = {weight_key(layer) for layer in spec.weight_sites}
    scales = {weight_scale_key(layer) for layer in spec.weight_sites}
    scales |= {key(site.name) for site in spec.activations for key in (scale_key, smoothing_key)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in codes | scales}
    _refuse("lacks", {name for name, _ in model.named_parameters()} - kept.keys() - codes)
    _refuse("has, and the denoiser does not take,", kept.keys() - model.state_dict().keys())
    return kept


def _refuse(does: str, names: Collection[str]) -> None:
    if names:
        first, *more = sorted(names)
        others = f" and {len(more)} more" if more else ""
        raise SdqError(
            f"The quantized checkpoint {does} the tensor {first}{others}.",
            "Name the model that it was trained from, or train it again.",
        )
