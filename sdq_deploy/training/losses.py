"""The training loss: the output's error, and inter-layer distillation (ILD) on the sensitive layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdq_deploy.training.guidance import ModelOutputs, guide
from sdq_export.stepping import StepDenoiser

__all__ = ["distillation_loss", "layer_outputs", "output_loss"]


def output_loss(
    student: ModelOutputs, teacher: ModelOutputs, kind: Literal["guided", "separate"], guidance_scale: float
) -> Tensor:
    """Mean squared error of the model's output.

    "guided" compares what the sampler is given, unconditional + g (conditional - unconditional): an error that both
    passes share then counts once, one that they do not share counts g-fold, as it does in the image. "separate" is the
    mean of both passes' own errors.
    """
    if kind == "guided" or student.unconditional is None or teacher.unconditional is None:
        return (guide(student, guidance_scale).float() - guide(teacher, guidance_scale).float()).square().mean()
    conditional = (student.conditional.float() - teacher.conditional.float()).square().mean()
    unconditional = (student.unconditional.float() - teacher.unconditional.float()).square().mean()
    return (conditional + unconditional) / 2


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

        module: nn.Module = denoiser.unet.get_submodule(layer)
        return module.register_forward_hook(hook)

    handles = [record(layer) for layer in layers]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
