"""What a fit keeps on the device beside activations, reckoned from the denoiser's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sdq_deploy.recipes.schema import Fit, Recipe
from sdq_deploy.training.counting import buffer_bytes, count, layer_weight
from sdq_deploy.training.memory import state_bytes
from sdq_deploy.training.methods.efficientdm import shared_fit
from sdq_deploy.training.optimizer import moment_bytes
from sdq_deploy.training.teacher import half_precision, teacher_is_asked
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["DeviceState", "device_state"]

_FP32, _HALF = 4, 2


@dataclass(frozen=True)
class DeviceState:
    """Bytes in one process.

    Attributes:
        trainable: parameters that learn, their gradients and moments.
        moments: of these, AdamW's moments.
        student: the student's weights and buffers that do not learn.
        teacher: its weights and buffers; 0 where the fit does not ask it anything.
    """

    trainable: int
    moments: int
    student: int
    teacher: int


def device_state(denoiser: StepDenoiser, spec: QuantSpec, recipe: Recipe) -> DeviceState:
    """Everything of the student learns in ours, the adapters alone in EfficientDM, nothing in the others."""
    weights, buffers = _FP32 * count(denoiser.model), buffer_bytes(denoiser.model)
    if recipe.method == "s2p":
        learning = list(denoiser.model.parameters())
        teacher = _teacher_bytes(denoiser, recipe.fit, min(recipe.sensitivity.top_k, len(spec.weights)))
        return _state(learning, recipe.fit, buffers, teacher)
    if recipe.method == "efficientdm":
        fit = shared_fit(recipe.fit, recipe.efficientdm)
        return _state(_adapters(denoiser, spec, recipe), fit, weights + buffers, _teacher_bytes(denoiser, fit, 0))
    return DeviceState(0, 0, weights + buffers, weights + buffers)


def _state(learning: list[nn.Parameter], fit: Fit, student: int, teacher: int) -> DeviceState:
    moments = sum(moment_bytes(parameter, fit.optimizer_state) for parameter in learning)
    return DeviceState(state_bytes(learning, fit.optimizer_state), moments, student, teacher)


def _adapters(denoiser: StepDenoiser, spec: QuantSpec, recipe: Recipe) -> list[nn.Parameter]:
    weights = [layer_weight(denoiser, site.layer) for site in spec.weights]
    rank = recipe.efficientdm.rank
    shapes = [shape for each in weights for shape in ((rank, each[0].numel()), (each.shape[0], rank))]
    return [nn.Parameter(weights[0].new_empty(shape)) for shape in shapes]


def _teacher_bytes(denoiser: StepDenoiser, fit: Fit, layers: int) -> int:
    """As `fit_teacher` makes it. Offloaded, one layer is there at a time."""
    if not teacher_is_asked(fit, layers):
        return 0
    converted = half_precision(fit) is not None
    halved = set(denoiser.family.quantizable_layers(denoiser.model)) if converted else set()
    sizes: list[int] = [
        parameter.numel() * (_HALF if name.rpartition(".")[0] in halved else _FP32)
        for name, parameter in denoiser.model.named_parameters()
    ]
    return buffer_bytes(denoiser.model) + (max(sizes) if fit.offload_teacher else sum(sizes))
