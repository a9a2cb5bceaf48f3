"""The teacher: the floating-point denoiser by step, in no more memory than its use asks for.

Where it computes where the checkpoint lies, it shares the checkpoint's weights; there is never a second FP32 copy of
what nothing changes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sdq_deploy.recipes.schema import Fit
from sdq_export.stepping import StepDenoiser

__all__ = ["fit_teacher", "half_precision", "make_teacher", "teacher_is_asked"]


def make_teacher(
    original: nn.Module,
    timesteps: Tensor,
    device: torch.device,
    *,
    half: torch.dtype | None = None,
    offload: bool = False,
) -> StepDenoiser:
    """The denoiser by step on `device`, without gradients.

    Args:
        original: FP32, on the CPU; neither changed nor moved. Weights that need not change are shared with it.
        timesteps: [T].
        device: where it computes.
        half: what the weights of the layers that autocast computes in half precision are stored in. Under autocast to
            this type the outputs are bit for bit those of FP32 weights, which autocast would round at every use.
        offload: keep the weights on the CPU and bring each layer's to `device` while it computes (accelerate's
            `cpu_offload`).
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in original.parameters()}
    denoiser = StepDenoiser(copy.deepcopy(original, shared), timesteps)
    layers = denoiser.network.quantizable_layers(denoiser.model) if half else ()
    for layer in layers:
        _convert(denoiser.model.get_submodule(layer), half)
    denoiser = denoiser.eval().requires_grad_(False)
    if not offload:
        for module in denoiser.modules():
            _convert(module, device)
        return denoiser
    from accelerate import cpu_offload

    cpu_offload(denoiser.model, execution_device=device)
    return denoiser


def teacher_is_asked(fit: Fit, layers: int) -> bool:
    """Whether the fit runs the teacher: the serial dataset holds its outputs, but not what `layers` layers put out."""
    return fit.pipeline != "serial-to-parallel" or (fit.ild_weight > 0 and layers > 0)


def half_precision(fit: Fit) -> torch.dtype | None:
    """What the fit's teacher is stored in: where all that is asked of it is features of layers, computed under
    autocast as the student's are, autocast's type; otherwise None, FP32."""
    if fit.pipeline != "serial-to-parallel":
        return None
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[fit.mixed_precision]


def fit_teacher(
    original: nn.Module, timesteps: Tensor, device: torch.device, fit: Fit, layers: int
) -> StepDenoiser | None:
    """The teacher as the fit needs it; None where nothing asks for it."""
    if not teacher_is_asked(fit, layers):
        return None
    return make_teacher(original, timesteps, device, half=half_precision(fit), offload=fit.offload_teacher)


def _convert(module: nn.Module, to: torch.device | torch.dtype | None) -> None:
    """Put new tensors, converted where need be, in the place of the module's own; `Module.to` would change the
    shared ones."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().to(to), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(to)
