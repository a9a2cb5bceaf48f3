"""Write a package: graphs, parity, files; nothing is written unless parity holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sdq_engines.errors import SdqError
from sdq_engines.in_progress import in_progress, what_was_killed
from sdq_engines.package.layout import PROLOGUE
from sdq_engines.package.store import Package
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.components import component_names
from sdq_export.devices import DeviceChoice, choose_device, full_fp32, memory_errors_named
from sdq_export.forecast import ExportForecast, forecast_export
from sdq_export.output import claimed_output, staged_path, staging_folder, write_files
from sdq_export.package_manifest import free_size_of, make_manifest
from sdq_export.parity import Gate, GateChoice, ParityReport, TeacherSamples
from sdq_export.parity.budget import choose_gate
from sdq_export.parity.samples import PARITY_PROMPTS
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.source import Source
from sdq_export.source_files import require_same_model
from sdq_export.stages import ExportJob, OnStage
from sdq_export.storage import Dtype, IntegerDtype, Storage

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
    *,
    checkpoint: QuantizedCheckpoint | None = None,
    dtype: Dtype = "fp16",
    prologue: IntegerDtype | None = None,
    text_encoder: IntegerDtype | None = None,
    vae: IntegerDtype | None = None,
    prompts: Sequence[str] = PARITY_PROMPTS,
    vae_encoder: bool = True,
    dynamic_size: bool = False,
    gate: GateChoice = "auto",
    device: DeviceChoice = "auto",
    engines: Sequence[str] = (),
    force: bool = False,
    on_stage: OnStage = lambda name, done, total: None,
    on_notice: OnNotice = lambda sentence: None,
) -> ExportResult:
    """Export a model, quantized or not, as a package without engines.

    Args:
        source: the source checkpoint.
        out: the package's folder: new, empty, or a package to replace.
        plan: the sampler, with its steps.
        guidance_scale: the package's default.
        checkpoint: the quantized denoiser; None exports the source in floating point.
        dtype: how floating-point weights are stored.
        prologue: store those of a quantized package's prologue as integers; gated by its own parity criterion.
        text_encoder: store those of the text encoders as integers, gated likewise.
        vae: store those of the VAE as integers, gated likewise.
        prompts: for the parity samples.
        vae_encoder: whether the package may start from images.
        dynamic_size: leave height and width free in the graphs, for engines of other sizes.
        gate: how much of the denoiser's run parity looks at: "full", a number of calls, or by the denoiser's size.
        device: where teacher, reference and gate run; "auto" is the GPU where torch has one.
        engines: that will be built of it: their builders' memory is foreseen too.
        force: export although the memory or the disk does not seem to suffice.
        on_stage: hears what is being done.
        on_notice: hears what a large model's export will take, and that an earlier one was killed here.

    Raises:
        SdqError: the model has an unsupported form, the folder is not ours, the machine is too small, or parity fails
            (nothing is written then).
    """
    _check_match(source, plan, checkpoint)
    if prologue is not None and checkpoint is None:
        raise SdqError(
            f"An {prologue.upper()} prologue is for quantized packages.",
            "Leave --prologue out, or export a training run.",
        )
    storage = Storage(dtype, prologue, text_encoder, vae)
    source = source.for_spec(checkpoint.spec if checkpoint else None)
    if killed := what_was_killed(out):
        on_notice(killed)
    with claimed_output(out) as folder, staging_folder(folder) as staging, in_progress(folder, "export") as work:

        def stage(name: str, done: int, total: int) -> None:
            work.stage(name)
            on_stage(name, done, total)

        source.family.check_source(source)
        _check_encoder(source, vae_encoder)
        parameters = sum(parameter.numel() for parameter in source.skeleton.parameters())
        shape, quantized = source.family.latent_shape(source), checkpoint is not None
        chosen = choose_gate(gate, plan.calls, shape, parameters, quantized)
        where = choose_device(device, parameters)
        free_size = free_size_of(source, plan) if dynamic_size else {}
        _foresee(forecast_export(source, chosen, quantized, where, engines), folder, force, on_notice)
        job = ExportJob(
            source, plan, guidance_scale, checkpoint, storage, prompts, vae_encoder, dynamic_size, chosen, where,
            staging, stage,
        )  # fmt: skip
        with full_fp32(), memory_errors_named(where):
            report, samples = job.run()
        report.require()
        stage("writing", 0, 0)
        components, graph = component_names(source, vae_encoder), ir.load(staged_path(staging, PROLOGUE))
        manifest = make_manifest(
            folder, source, plan, guidance_scale, checkpoint, dtype, components, graph, report, free_size
        )
        package = write_files(folder, staging, source, plan, manifest)
    return ExportResult(package, report, plan, samples, chosen)


def _foresee(found: ExportForecast, folder: Path, force: bool, on_notice: OnNotice) -> None:
    """Say what the export of a large model will take, and refuse what does not fit."""
    if found.is_small:
        return
    on_notice(found.sentence)
    if not force:
        found.require(folder)


def _check_encoder(source: Source, vae_encoder: bool) -> None:
    if source.family.extra_channels(source.skeleton) and not vae_encoder:
        raise SdqError(
            "An inpainting model needs its VAE encoder: it takes the masked image's latents.",
            "Leave --no-vae-encoder out.",
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
