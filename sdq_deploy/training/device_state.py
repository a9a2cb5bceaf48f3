"""What a fit keeps on the device beside activations, reckoned from the denoiser's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from sdq_deploy.recipes.schema import Fit, Recipe
from sdq_deploy.training.counting import buffer_bytes, count
from sdq_deploy.training.memory import state_bytes
from sdq_deploy.training.optimizer import moment_bytes
from sdq_deploy.training.registry import method_named
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
    """What the recipe's method keeps; where it runs no training loop, the student and the teacher."""
    method = method_named(recipe.method)
    weights, buffers = _FP32 * count(denoiser.model), buffer_bytes(denoiser.model)
    fit = method.loop(recipe)
    if fit is None:
        return DeviceState(0, 0, weights + buffers, weights + buffers)
    learning = method.learning(denoiser, spec, recipe)
    moments = sum(moment_bytes(parameter, fit.optimizer_state) for parameter in learning)
    student = buffers if method.learns_student else weights + buffers
    teacher = _teacher_bytes(denoiser, fit, method.sensitive_layers(recipe, spec))
    return DeviceState(state_bytes(learning, fit.optimizer_state), moments, student, teacher)


def _teacher_bytes(denoiser: StepDenoiser, fit: Fit, layers: int) -> int:
    """As `fit_teacher` makes it. Offloaded, one layer is there at a time."""
    if not teacher_is_asked(fit, layers):
        return 0
    converted = half_precision(fit) is not None
    halved = set(denoiser.network.quantizable_layers(denoiser.model)) if converted else set()
    sizes: list[int] = [
        parameter.numel() * (_HALF if name.rpartition(".")[0] in halved else _FP32)
        for name, parameter in denoiser.model.named_parameters()
    ]
    return buffer_bytes(denoiser.model) + (max(sizes) if fit.offload_teacher else sum(sizes))
