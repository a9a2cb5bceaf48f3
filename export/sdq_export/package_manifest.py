"""What an export says of a package: its manifest, but for the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from sdq_engines.errors import SdqError
from sdq_engines.package.layout import PROLOGUE, model_file
from sdq_engines.package.schema import Manifest, ModelIO, SamplerInfo
from sdq_export.components import component_names
from sdq_export.dynamic_shift import is_dynamic
from sdq_export.output import staged_path
from sdq_export.parity import ParityReport
from sdq_export.passes.prologue import prologue_names
from sdq_export.provenance import source_info, tool_versions
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.source import Source
from sdq_export.stages import ExportJob

__all__ = ["free_size_of", "make_manifest", "sampler_info"]


def make_manifest(folder: Path, job: ExportJob, report: ParityReport, free_size: Mapping[str, int]) -> Manifest:
    """The manifest of an export whose graphs are staged.

    Args:
        folder: the package's.
        job: the export.
        report: what parity measured.
        free_size: of `free_size_of`, where the size is free.
    """
    source, checkpoint = job.source, job.checkpoint
    prologue = ir.load(staged_path(job.staging, PROLOGUE))
    components = component_names(source, job.settings.vae_encoder)
    family = source.family
    return Manifest(
        name=folder.resolve().name,
        family=family.name,
        precision=checkpoint.spec.precision if checkpoint else job.settings.dtype,
        io=ModelIO(
            latent_shape=family.latent_shape,
            image_size=family.image_size,
            prologue_inputs=[value.name or "" for value in prologue.graph.inputs],
            prologue_outputs=prologue_names(prologue),
            force_zeros_for_empty_prompt=family.zeros_for_no_prompt,
            **free_size,
            extra_channels=family.extra_channels,
        ),
        text=[encoder.info() for encoder in family.text_encoders],
        sampler=sampler_info(job.plan, job.guidance_scale),
        defaults=family.call_defaults,
        source=source_info(source, checkpoint),
        components={name: model_file(name) for name in components},
        full_precision=[name for name in family.full_precision if name in components],
        tools=tool_versions(),
        files={},
        fidelity={"parity": report.to_manifest()},
    )


def free_size_of(source: Source, plan: SamplerPlan) -> dict[str, int]:
    """What the manifest says of a free size, in pixels.

    Raises:
        SdqError: the sampler's timesteps are those of one size.
    """
    if is_dynamic(plan.config):
        raise SdqError(
            f"The scheduler of {source.model} has use_dynamic_shifting: each size of image has timesteps of its own, "
            "and a package has those of one.",
            "Leave --dynamic-size out, or set use_dynamic_shifting to false in scheduler/scheduler_config.json.",
        )
    family, pixels = source.family, source.family.pixels_per_latent
    limit = family.latent_limit
    found = {"size_multiple": family.latent_multiple * pixels}
    return found if limit is None else {**found, "size_limit": limit * pixels}


def sampler_info(plan: SamplerPlan, guidance_scale: float) -> SamplerInfo:
    """The manifest's record of a sampler; `guidance_scale` is the package's default."""
    return SamplerInfo(
        scheduler=plan.scheduler,
        config=plan.config,
        prediction_type=str(plan.config.get("prediction_type", "epsilon")),
        num_inference_steps=plan.num_inference_steps,
        num_calls=plan.calls,
        history=plan.history,
        stochastic=plan.stochastic,
        guidance_scale=guidance_scale,
        order=plan.order,
    )
