"""Stage precompute: time information precalculation (TIP), evaluated and held against the denoiser it replaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import load_split
from sdq_engines.errors import SdqError
from sdq_export.conditioning import Conditioning
from sdq_export.inpainting import with_extra

__all__ = ["precompute", "table_error"]

#: Relative L2 between the denoiser and its tabulated form above which something is wrong: FP32 leaves some 1e-7.
TOLERANCE = 1e-4


def precompute(context: TrainingContext) -> dict[str, float]:
    """Check the denoiser with its time path tabulated against the original.

    Returns:
        ``error``, their relative L2 distance.

    Raises:
        SdqError: the two differ; the time path is of a kind that the tables do not capture.
    """
    with context.bar("precompute", 1) as advance:
        error = table_error(context)
        advance()
    if not error <= TOLERANCE:
        raise SdqError(
            f"The tabulated time path differs from the denoiser's by {error:.1e} (relative), more than {TOLERANCE}.",
            "The denoiser's time path is of a form that is not supported; please report the checkpoint.",
        )
    return {"error": error}


@torch.no_grad()
def table_error(context: TrainingContext) -> float:
    """Relative L2 distance of the tabulated denoiser from the original, on a held-out latent of each step."""
    data = load_split(context.folder.dataset, "validation")
    rows = torch.cat([data.at_step(step, 1) for step in range(context.plan.calls)])
    latents, steps = data.shard.latents[rows], data.shard.steps[rows]
    conditioning = data.conditioning[data.shard.prompt_ids[rows]]
    parts = torch.split(torch.arange(len(rows)), 4)
    wanted = _originals(context, latents, context.timesteps[steps], conditioning, parts)
    device = context.device
    found = [
        context.teacher(latents[part].to(device), steps[part].to(device), conditioning[part].to(device)).cpu()
        for part in parts
    ]
    difference = torch.linalg.vector_norm(torch.cat(found) - torch.cat(wanted))
    return float(difference / torch.linalg.vector_norm(torch.cat(wanted)))


def _originals(
    context: TrainingContext,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    parts: Sequence[Tensor],
) -> list[Tensor]:
    """The original denoiser's outputs for parts of the rows. It is on the device for that long, in the teacher's
    place."""
    context.release_teacher()
    denoiser, device = context.source.denoiser, context.device
    denoiser.to(device)
    try:
        return [
            context.source.family.network.predict(
                denoiser,
                with_extra(denoiser, latents[part].to(device)),
                timesteps[part].to(device),
                conditioning[part].to(device),
            ).cpu()
            for part in parts
        ]
    finally:
        denoiser.to("cpu")
