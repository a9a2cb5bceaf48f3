"""The reference: a fake-quantized denoiser in pure torch, built from a quantized checkpoint alone.

Export checks its graphs against it and evaluation compares with it. Nothing of ModelOpt is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdq_export.checkpoint import dequantize_weight, scale_key, weight_key, weight_scale_key
from sdq_export.quantspec import ActivationSite, QuantSpec
from sdq_export.rounding import fake_quantize
from sdq_export.smoothing import smooth_
from sdq_export.step_state import StepState
from sdq_export.stepping import StepDenoiser

__all__ = ["ActivationQuantizer", "build_reference", "move_reference_"]


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


def build_reference(
    original: nn.Module, spec: QuantSpec, tensors: Mapping[str, Tensor], timesteps: Tensor
) -> StepDenoiser:
    """Build the fake-quantized denoiser of a checkpoint.

    Args:
        original: the source's denoiser; it becomes the reference, and is not to be used again.
        spec: the sites.
        tensors: the checkpoint's, keyed as sdq_export.checkpoint says.
        timesteps: [T], the timestep of each step.

    Returns:
        A StepDenoiser in eval mode. Its activation quantizers are `denoiser.quantizers[site name]`.
    """
    denoiser = StepDenoiser(smooth_(original, spec, tensors), timesteps)
    model: Any = denoiser.model
    weights = spec.weight_sites
    derived = {weight_key(layer) for layer in weights}
    derived |= {weight_scale_key(layer) for layer in weights} | {scale_key(site.name) for site in spec.activations}
    kept = {name: tensor for name, tensor in tensors.items() if name not in derived}
    known = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in kept.items() if name in known}, strict=False)
    with torch.no_grad():
        for layer, site in weights.items():
            module = model.get_submodule(layer)
            module.weight.copy_(dequantize_weight(tensors[weight_key(layer)], tensors[weight_scale_key(layer)], site))
    quantizers: dict[str, ActivationQuantizer] = {}
    for activation in spec.activations:
        quantizer = ActivationQuantizer(activation, tensors[scale_key(activation.name)], denoiser.state)
        quantizers[activation.name] = quantizer
        for layer in activation.consumers:
            model.get_submodule(layer).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]), *args[1:]))
    # A plain dict: as submodules the quantizers would change the denoiser's own names.
    object.__setattr__(denoiser, "quantizers", quantizers)
    return denoiser.eval().requires_grad_(False)


def move_reference_(denoiser: StepDenoiser, device: torch.device | str) -> None:
    """Move a denoiser of `build_reference`, or a plain one, with its quantizers, which are no submodules of it."""
    denoiser.to(device)
    for quantizer in getattr(denoiser, "quantizers", {}).values():
        quantizer.to(device)
