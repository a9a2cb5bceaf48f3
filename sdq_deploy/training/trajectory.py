"""How far the student's own sampling ends from the teacher's, on held-out prompts: what the best state is chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from sdq_deploy.training.collect import starting_noise
from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import SerialData
from sdq_deploy.training.prompts import stable_seed
from sdq_export.guidance import GuidedDenoiser
from sdq_export.sampler import run_sampler
from sdq_export.stepping import StepDenoiser

__all__ = ["sample_latents", "trajectory_snr"]


def trajectory_snr(context: TrainingContext, denoiser: StepDenoiser, data: SerialData) -> float:
    """Mean over held-out prompts of 10 log10(||z_teacher||^2 / ||z_student - z_teacher||^2) in dB, z the final latents.

    The prompts are shared among the processes; each returns the mean of all. Everything runs in FP32.
    """
    accelerator = context.accelerator
    mine = list(range(len(data.conditioning)))[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros(2, device=context.device)
    for first in range(0, len(mine), context.recipe.collect.prompts_per_shard):
        members = mine[first : first + context.recipe.collect.prompts_per_shard]
        wanted = data.shard.final[members].to(context.device)
        found = sample_latents(context, denoiser, data, members)
        ratio = wanted.square().sum(dim=(1, 2, 3)) / (found - wanted).square().sum(dim=(1, 2, 3)).clamp_min(1e-20)
        total += torch.stack([10 * torch.log10(ratio).sum(), torch.tensor(float(len(members)), device=context.device)])
    summed: Tensor = accelerator.reduce(total, reduction="sum")
    return float(summed[0] / summed[1])


@torch.no_grad()
def sample_latents(context: TrainingContext, denoiser: StepDenoiser, data: SerialData, members: list[int]) -> Tensor:
    """Final latents f32 [P, C, h, w] of held-out prompts, sampled with the noise that the teacher started from."""
    generators = [torch.Generator().manual_seed(stable_seed(context.seed, "validation", member)) for member in members]
    noise = starting_noise(context, generators).to(context.device)
    guided = GuidedDenoiser(denoiser, context.recipe.sampling.guidance, data.conditioning[members], data.empty)
    return run_sampler(context.plan, guided, noise, generator=generators)
