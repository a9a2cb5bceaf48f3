"""Write a package: graphs, parity, files; nothing is written unless parity holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdq_engines.errors import SdqError
from sdq_engines.in_progress import in_progress, what_was_killed
from sdq_engines.package.store import Package
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.devices import choose_device, full_fp32, memory_errors_named
from sdq_export.forecast import ExportForecast, forecast_export
from sdq_export.identity import require_same_model
from sdq_export.output import claimed_output, staging_folder, write_files
from sdq_export.package_manifest import free_size_of, make_manifest
from sdq_export.parity import Gate, ParityReport, TeacherSamples
from sdq_export.parity.budget import choose_gate
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.settings import PackageSettings
from sdq_export.source import Source
from sdq_export.stages import ExportJob, OnStage

__all__ = ["ExportResult", "OnNotice", "OnStage", "export_package"]

OnNotice = Callable[[str], None]
"""Hears a sentence: what the export will take, or what became of the last one."""


@dataclass(frozen=True)
class ExportResult:
    """A written package and what parity measured."""

    package: Package
    report: ParityReport
    plan: SamplerPlan
    samples: TeacherSamples
    """The teacher's run, for the check of engines."""
    gate: Gate
    """The steps that they are checked at."""


def export_package(
    source: Source,
    out: str | Path,
    plan: SamplerPlan,
    guidance_scale: float,
    settings: PackageSettings = PackageSettings(),
    *,
    checkpoint: QuantizedCheckpoint | None = None,
    on_stage: OnStage = lambda name, done, total: None,
    on_notice: OnNotice = lambda sentence: None,
) -> ExportResult:
    """Export a model, quantized or not, as a package without engines.

    Args:
        source: the source checkpoint.
        out: the package's folder: new, empty, or a package to replace.
        plan: the sampler, with its steps.
        guidance_scale: the package's default.
        settings: how it is stored, what it can do, how it is proved.
        checkpoint: the quantized denoiser; None exports the source in floating point.
        on_stage: hears what is being done.
        on_notice: hears what a large model's export will take, and that an earlier one was killed here.

    Raises:
        SdqError: the model has an unsupported form, the folder is not ours, the machine is too small, or parity fails
            (nothing is written then).
    """
    _check_match(source, plan, checkpoint)
    _check_prologue(settings, checkpoint)
    source = source.for_spec(checkpoint.spec if checkpoint else None)
    if killed := what_was_killed(out):
        on_notice(killed)
    with claimed_output(out) as folder, staging_folder(folder) as staging, in_progress(folder, "export") as work:

        def stage(name: str, done: int, total: int) -> None:
            work.stage(name)
            on_stage(name, done, total)

        source.family.check()
        _check_encoder(source, settings.vae_encoder)
        free_size = free_size_of(source, plan) if settings.dynamic_size else {}
        job = _planned(source, plan, guidance_scale, settings, checkpoint, staging, stage)
        forecast = forecast_export(source, job.gate, checkpoint is not None, job.device, settings.engines)
        _foresee(forecast, folder, settings.force, on_notice)
        with full_fp32(), memory_errors_named(job.device):
            report, samples = job.run()
        report.require()
        stage("writing", 0, 0)
        package = write_files(folder, staging, source, plan, make_manifest(folder, job, report, free_size))
    return ExportResult(package, report, plan, samples, job.gate)


def _planned(
    source: Source,
    plan: SamplerPlan,
    guidance_scale: float,
    settings: PackageSettings,
    checkpoint: QuantizedCheckpoint | None,
    staging: Path,
    on_stage: OnStage,
) -> ExportJob:
    """The export with its gate and its device chosen, by the size of the denoiser."""
    parameters = sum(parameter.numel() for parameter in source.skeleton.parameters())
    shape = source.family.latent_shape
    gate = choose_gate(settings.gate, plan.calls, shape, parameters, checkpoint is not None)
    device = choose_device(settings.device, parameters)
    return ExportJob(source, plan, guidance_scale, checkpoint, settings, gate, device, staging, on_stage)


def _foresee(found: ExportForecast, folder: Path, force: bool, on_notice: OnNotice) -> None:
    """Say what the export of a large model will take, and refuse what does not fit."""
    if found.is_small:
        return
    on_notice(found.sentence)
    if not force:
        found.require(folder)


def _check_encoder(source: Source, vae_encoder: bool) -> None:
    if source.family.extra_channels and not vae_encoder:
        raise SdqError(
            "An inpainting model needs its VAE encoder: it takes the masked image's latents.",
            "Leave --no-vae-encoder out.",
        )


def _check_prologue(settings: PackageSettings, checkpoint: QuantizedCheckpoint | None) -> None:
    if settings.prologue is not None and checkpoint is None:
        raise SdqError(
            f"An {settings.prologue.upper()} prologue is for quantized packages.",
            "Leave --prologue out, or export a training run.",
        )


def _check_match(source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None) -> None:
    if checkpoint is None:
        return
    trained = checkpoint.info.source
    require_same_model(
        source,
        trained.sha256,
        trained.parts,
        f"The quantized checkpoint was not trained from {source.model} as it is",
        "Name the model that it was trained from, --model FOLDER, or train it again.",
    )
    if plan.calls != checkpoint.spec.num_steps:
        raise SdqError(
            f"The checkpoint has scales for {checkpoint.spec.num_steps} model calls, this sampler makes {plan.calls}.",
            "Export it with the scheduler and steps that it was trained with.",
        )
