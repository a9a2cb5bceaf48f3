"""The training loss: the output's error, and inter-layer distillation (ILD) on the sensitive layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdq_engines.guidance import Guidance
from sdq_export.guidance import ModelOutputs, combine
from sdq_export.sampler import SamplerPlan
from sdq_export.stepping import StepDenoiser

__all__ = ["distillation_loss", "layer_outputs", "output_loss", "step_weights"]


def step_weights(plan: SamplerPlan, power: float) -> Tensor:
    """How much each step's output loss counts, f32 [T], of mean 1.

    c_t is what the sampler makes of the model's output at step t in the final latents, were the later outputs fixed
    (for DDIM the step in sigma); the weight is c_t^(2 power): 0 counts all steps alike, 1 as the final error does.
    """
    influence, carried = torch.zeros(plan.calls), torch.eye(plan.slots)[0]
    for step in reversed(range(plan.calls)):
        row = plan.step_map(0, step)
        influence[step] = float(carried @ torch.from_numpy(row.output))
        carried = carried @ torch.from_numpy(row.matrix)
    weights = influence.abs().pow(2 * power)
    return weights / weights.mean()


def output_loss(
    student: ModelOutputs,
    teacher: ModelOutputs,
    kind: Literal["guided", "separate"],
    guidance: Guidance,
    weights: Tensor,
) -> Tensor:
    """Mean squared error of the model's output, samples weighted by `weights` f32 [B].

    "guided" compares what the sampler is given, unconditional + g (conditional - unconditional): an error that both
    passes share then counts once, one that they do not share counts g-fold, as it does in the image. "separate" is the
    mean of both passes' own errors.
    """
    if kind == "guided" or student.unconditional is None or teacher.unconditional is None:
        return _weighted_error(combine(student, guidance), combine(teacher, guidance), weights)
    conditional = _weighted_error(student.conditional, teacher.conditional, weights)
    return (conditional + _weighted_error(student.unconditional, teacher.unconditional, weights)) / 2


def _weighted_error(found: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    return ((found.float() - wanted.float()).square().flatten(1).mean(dim=1) * weights).mean()


def distillation_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Sum over layers of ||h_s - h_t||^2 / ||h_t||^2, per sample, averaged over the samples.

    Per sample, so that a batch split over processes has the loss of the whole.
    """
    losses = []
    for layer, wanted in teacher.items():
        target = wanted.detach().float().flatten(1)
        difference = (student[layer].float().flatten(1) - target).square().sum(dim=1)
        losses.append((difference / target.square().sum(dim=1).clamp_min(1e-12)).mean())
    return torch.stack(losses).sum()


@contextmanager
def layer_outputs(denoiser: StepDenoiser, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record what these layers put out during the block, gradients attached.

    Recording stops with the block: gradient checkpointing calls the layers again in the backward.
    """
    recorded: dict[str, Tensor] = {}

    def record(layer: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            recorded[layer] = output

        module: nn.Module = denoiser.model.get_submodule(layer)
        return module.register_forward_hook(hook)

    handles = [record(layer) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
