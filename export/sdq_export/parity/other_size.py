"""Parity of graphs whose size is free: at another size than the package's own they must be the same model."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import nn

from sdq_export.denoiser import DenoiserGraphs
from sdq_export.parity.components import check_vae_decoder, check_vae_encoder
from sdq_export.parity.gate import float_distance
from sdq_export.parity.report import Criterion
from sdq_export.parity.samples import TeacherSamples
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.stepping import StepDenoiser

__all__ = ["check_other_size"]

_SEED = 31


def check_other_size(
    graphs: DenoiserGraphs,
    vae_decoder: tuple[ir.Model, nn.Module],
    vae_encoder: tuple[ir.Model, nn.Module] | None,
    plan: SamplerPlan,
    samples: TeacherSamples,
    reference: StepDenoiser,
) -> list[Criterion]:
    """Denoiser (activation quantization bypassed), decoder and encoder on latents that are lower and wider.

    Where the package's own size is the largest that there is, they are lower and narrower.

    Args:
        graphs: the canonical graphs of the denoiser.
        vae_decoder: the decoder's graph and the torch module that it equals.
        vae_encoder: the encoder's, if there is one.
        plan: the sampler.
        samples: prompts and guidance.
        reference: the torch StepDenoiser, as in `check_graphs`.
    """
    unit, limit = reference.family.latent_multiple(reference.model), reference.family.latent_limit(reference.model)
    count, channels, height, width = samples.model_inputs[0].shape
    size = (max(height - unit, unit), width + unit)
    if limit is not None and size[1] > limit:
        size = (max(height - 2 * unit, unit), max(width - unit, unit))
    generator = torch.Generator().manual_seed(_SEED)
    latents = torch.randn(count, channels, *size, generator=generator)
    extra = None
    if samples.extra is not None:
        extra = torch.randn(count, samples.extra.shape[1], *size, generator=generator)
    step = plan.calls // 2
    distance = float_distance(graphs, plan, samples, reference, latents, step, extra)
    denoiser = Criterion(
        name="float_graph_other_size",
        says=f"relative distance from torch at {size[1]}x{size[0]} latents, without activation quantization,",
        limit=1e-4,
        steps=(step,),
        per_step=(distance,),
    )
    found = [denoiser, _renamed(check_vae_decoder(*vae_decoder, latents[:1]))]
    if vae_encoder is not None:
        found.append(_renamed(check_vae_encoder(*vae_encoder, vae_decoder[1], latents[:1])))
    return found


def _renamed(criterion: Criterion) -> Criterion:
    return criterion.model_copy(
        update={"name": f"{criterion.name}_other_size", "says": f"{criterion.says}, at another size,"}
    )
