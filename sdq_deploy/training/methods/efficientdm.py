"""Method efficientdm: low-rank adapters and scales learn, the weights stay (docs/methods.md).

After He et al., "EfficientDM" (ICLR 2024). It is the fit of our own training with another parametrization of the
weights, other parameter groups, and neither inter-layer distillation nor freezing. Its data-free distillation along the
teacher's trajectory is what the serial dataset holds; its temporal step sizes are the scale groups.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import nn

from sdq_deploy.recipes.schema import EfficientDM, Fit, Recipe
from sdq_deploy.sharing import await_files
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.counting import layer_weight
from sdq_deploy.training.fit import FitPlan, fit
from sdq_deploy.training.method import Stage, TrainingMethod
from sdq_deploy.training.methods.adapters import attach_adapters
from sdq_deploy.training.prompts import stable_seed
from sdq_deploy.training.stages import DATA, fit_values
from sdq_deploy.training.student import Student
from sdq_export.quantspec import QuantSpec
from sdq_export.stepping import StepDenoiser

__all__ = ["METHOD", "adapter_groups", "adapter_training", "shared_fit"]


def adapter_training(context: TrainingContext) -> FitPlan:
    """The fit as EfficientDM does it."""
    recipe = context.recipe
    await_files([context.folder.scales])
    student = Student(context.source.denoiser, context.timesteps, context.spec, load_file(context.folder.scales))
    attach_adapters(student, recipe.efficientdm.rank, stable_seed(context.seed, "adapters"))
    return FitPlan(
        recipe=shared_fit(recipe.fit, recipe.efficientdm),
        freezing=recipe.freezing.model_copy(update={"enabled": False}),
        student=student,
        groups=adapter_groups(student, recipe.efficientdm),
        sensitive=[],
        schedule="linear",
    )


def shared_fit(fit: Fit, settings: EfficientDM) -> Fit:
    """Steps, batch and precision of our own fit; everything that the method has its own word on replaced."""
    return fit.model_copy(
        update={
            "pipeline": "serial-to-parallel",
            "loss": "guided",
            "step_weighting": 0.0,
            "ild_weight": 0.0,
            "betas": settings.betas,
            "warmup_steps": 0,
            # Its authors do not clip.
            "max_grad_norm": math.inf,
            "ema_decay": 0.0,
        }
    )


def adapter_groups(student: Student, settings: EfficientDM) -> list[dict[str, Any]]:
    """AdamW groups: one per adapter, weight scales, activation scales.

    Scale-aware optimization (section 3.3 of the paper): an adapter's rate is proportional to the mean of its layer's
    weight scales, for it takes an update of the order of the scale to change an integer. Adam divides a factor on the
    gradient out again, so the factor is on the rate.
    """
    groups = [
        _group(
            f"adapter of {layer}",
            [quantizer.adapter_down, quantizer.adapter_up],
            settings.adapter_lr * float(student.weight_scale(layer).detach().mean()),
            settings.weight_decay,
        )
        for layer, quantizer in student.weight_quantizers.items()
    ]
    weight_scales = [quantizer.log_scale for quantizer in student.weight_quantizers.values()]
    groups.append(_group("weight scales", weight_scales, settings.weight_scale_lr, 0.0))
    activation_scales = [quantizer.log_scale for quantizer in student.activation_quantizers.values()]
    if activation_scales:
        groups.append(_group("activation scales", activation_scales, settings.activation_scale_lr, 0.0))
    return groups


def _group(name: str, params: list[Any], rate: float, decay: float) -> dict[str, Any]:
    return {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay, "name": name}


def _inputs(context: TrainingContext) -> Any:
    recipe = context.recipe
    shared = fit_values(shared_fit(recipe.fit, recipe.efficientdm))
    return [recipe.method, shared, recipe.efficientdm.model_dump(mode="json"), context.seed]


def _adapters(denoiser: StepDenoiser, spec: QuantSpec, recipe: Recipe) -> list[nn.Parameter]:
    """Parameters of the adapters' shapes, of one value."""
    weights = [layer_weight(denoiser, site.layer) for site in spec.weights]
    rank = recipe.efficientdm.rank
    shapes = [shape for each in weights for shape in ((rank, each[0].numel()), (each.shape[0], rank))]
    return [nn.Parameter(weights[0].new_empty(shape)) for shape in shapes]


METHOD = TrainingMethod(
    name="efficientdm",
    fit=Stage("fit", partial(fit, make_plan=adapter_training), _inputs, DATA, everywhere=True),
    groups=lambda recipe: recipe.quantization.groups,
    loop=lambda recipe: shared_fit(recipe.fit, recipe.efficientdm),
    learning=_adapters,
)
