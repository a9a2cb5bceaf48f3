"""Stage precompute: time information precalculation (TIP), evaluated and held against the UNet it replaces."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdq_deploy.training.context import TrainingContext
from sdq_deploy.training.dataset import load_split
from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write
from sdq_export.inpainting import with_extra
from sdq_export.stepping import time_tables

__all__ = ["precompute", "table_error"]

#: Relative L2 between the UNet and its tabulated form above which something is wrong: FP32 leaves some 1e-7.
TOLERANCE = 1e-4


def precompute(context: TrainingContext) -> None:
    """Write the table of every ResNet block, f32 [T, C], and check the tabulated denoiser against the UNet.

    Raises:
        SdqError: the two differ; the time path is of a kind that the tables do not capture.
    """
    tables = time_tables(context.source.unet, context.timesteps)
    with context.bar("precompute", 1) as advance:
        error = table_error(context)
        advance()
    if not error <= TOLERANCE:
        raise SdqError(
            f"The tabulated time path differs from the UNet's by {error:.1e} (relative), more than {TOLERANCE}."
        )
    if context.accelerator.is_main_process:
        with atomic_write(context.folder.tables) as temporary:
            save_file({name: table.contiguous() for name, table in tables.items()}, temporary)


@torch.no_grad()
def table_error(context: TrainingContext) -> float:
    """Relative L2 distance of the tabulated denoiser from the UNet, on a held-out latent of each step."""
    data = load_split(context.folder.dataset, "validation")
    rows = torch.cat([data.at_step(step, 1) for step in range(context.plan.calls)])
    latents, steps = data.shard.latents[rows], data.shard.steps[rows]
    embeddings = data.embeddings[data.shard.prompt_ids[rows]]
    found, wanted = [], []
    for part in torch.split(torch.arange(len(rows)), 4):
        inputs = (latents[part].to(context.device), embeddings[part].to(context.device))
        found.append(context.teacher(inputs[0], steps[part].to(context.device), inputs[1]).cpu())
        wanted.append(_plain(context, latents[part], context.timesteps[steps[part]], embeddings[part]))
    difference = torch.linalg.vector_norm(torch.cat(found) - torch.cat(wanted))
    return float(difference / torch.linalg.vector_norm(torch.cat(wanted)))


def _plain(context: TrainingContext, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
    unet = context.source.unet.to(context.device)
    inputs = (latents.to(context.device), timesteps.to(context.device), embeddings.to(context.device))
    output: Tensor = unet(with_extra(unet, inputs[0]), *inputs[1:], return_dict=False)[0]
    return output.cpu()
