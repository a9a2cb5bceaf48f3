"""Run a denoiser over latents of the serial dataset."""

from __future__ import annotations

from torch import Tensor

from sdq_deploy.training.dataset import SerialData
from sdq_export.guidance import ModelOutputs, predict_outputs
from sdq_export.stepping import StepDenoiser

__all__ = ["outputs_on"]


def outputs_on(denoiser: StepDenoiser, data: SerialData, rows: Tensor) -> ModelOutputs:
    """What a denoiser answers to some latents of the dataset, every row of guidance as in inference.

    Args:
        denoiser: computes where it is.
        data: the dataset.
        rows: int64 [B], positions of latents.

    Returns:
        [B, C, h, w] each, on the denoiser's device.
    """
    device = next(denoiser.parameters()).device
    negative = data.empty.to(device) if data.guided else None
    conditioning = data.conditioning[data.shard.prompt_ids[rows]].to(device)
    latents, steps = data.shard.latents[rows].to(device), data.shard.steps[rows].to(device)
    return predict_outputs(denoiser, latents, steps, conditioning, negative)
