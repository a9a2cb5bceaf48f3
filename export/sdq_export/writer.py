"""Write a package: graphs, parity, files; nothing is written unless parity holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.components import (
    Components,
    make_denoiser,
    make_reference,
    make_text_encoder,
    make_vae_decoder,
    make_vae_encoder,
)
from sdq_export.output import claimed_output, staging_folder, write_files
from sdq_export.package_manifest import free_size_of, make_manifest
from sdq_export.parity import ParityReport, TeacherSamples, check_graphs, record_teacher
from sdq_export.parity.components import check_text_encoder, check_vae_decoder, check_vae_encoder
from sdq_export.parity.other_size import check_other_size
from sdq_export.parity.prologue import round_prologue_
from sdq_export.parity.rounded import rounded_text_encoder, rounded_vae_decoder, rounded_vae_encoder
from sdq_export.parity.samples import PARITY_PROMPTS
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.source import Source
from sdq_export.source_files import require_same_model
from sdq_export.storage import Dtype, IntegerDtype, Storage

__all__ = ["ExportResult", "OnStage", "export_package"]

_PARITY_SECONDS, _PARITY_RUNS, _FEWEST_PARITY_STEPS = 300.0, 4, 5
"""Parity runs a denoiser about four times a step, each about as slow as the teacher's call."""

OnStage = Callable[[str, int, int], None]
"""Hears a stage's name, how much of it is done, and of how much; 0 of 0 where there is nothing to count."""


@dataclass(frozen=True)
class ExportResult:
    """A written package and what parity measured."""

    package: Package
    report: ParityReport
    plan: SamplerPlan
    samples: TeacherSamples
    """The teacher's trajectory, for the check of engines."""


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
    on_stage: OnStage = lambda name, done, total: None,
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
        on_stage: hears what is being done.

    Raises:
        SdqError: the model has an unsupported form, the folder is not ours, or parity fails (nothing is written then).
    """
    _check_match(source, plan, checkpoint)
    if prologue is not None and checkpoint is None:
        raise SdqError(
            f"An {prologue.upper()} prologue is for quantized packages.",
            "Leave --prologue out, or export a training run.",
        )
    storage = Storage(dtype, prologue, text_encoder, vae)
    source = source.for_spec(checkpoint.spec if checkpoint else None)
    with claimed_output(out) as folder, staging_folder(folder) as staging:
        source.family.check_source(source)
        _check_encoder(source, vae_encoder)
        free_size = free_size_of(source) if dynamic_size else {}
        components, report, samples = _make(
            source, plan, guidance_scale, checkpoint, storage, prompts, vae_encoder, dynamic_size, on_stage
        )
        report.require()
        on_stage("writing", 0, 0)
        manifest = make_manifest(folder, source, plan, guidance_scale, checkpoint, dtype, components, report, free_size)
        package = write_files(folder, staging, source, plan, components, manifest)
    return ExportResult(package, report, plan, samples)


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


def _make(
    source: Source,
    plan: SamplerPlan,
    guidance_scale: float,
    checkpoint: QuantizedCheckpoint | None,
    storage: Storage,
    prompts: Sequence[str],
    vae_encoder: bool,
    dynamic_size: bool,
    on_stage: OnStage,
) -> tuple[Components, ParityReport, TeacherSamples]:
    """Every graph and its parity."""
    on_stage("sampling with the floating-point model", 0, plan.calls)
    started = time.perf_counter()
    samples = record_teacher(
        source,
        plan,
        guidance_scale,
        prompts,
        lambda step: on_stage("sampling with the floating-point model", step + 1, plan.calls),
    )
    steps = _parity_steps(plan.calls, (time.perf_counter() - started) / plan.calls)
    on_stage("capturing the denoiser", 0, 0)
    reference = make_reference(source, plan, checkpoint, storage.dtype)
    others, integer_layers = [], list[str]()
    if storage.prologue is not None:
        on_stage(f"parity, {storage.prologue.upper()} prologue", 0, 0)
        integer_layers, criterion = round_prologue_(reference, samples, steps, storage.prologue)
        others.append(criterion)
    denoiser = make_denoiser(source, plan, reference, checkpoint, storage.dtype, dynamic_size, integer_layers)
    report = check_graphs(
        denoiser,
        plan,
        samples,
        reference,
        checkpoint,
        steps,
        on_stage=lambda name, done, total: on_stage(f"parity, {name.replace('_', ' ')}", done, total),
    )
    text_encoders = {}
    for text_encoder in source.family.text_encoders:
        on_stage(f"capturing the {text_encoder.component.replace('_', ' ')}", 0, 0)
        graph, module = make_text_encoder(source, text_encoder, storage.dtype, storage.text_encoder)
        others.append(check_text_encoder(graph, module, source, text_encoder, prompts))
        if storage.text_encoder is not None:
            others.append(rounded_text_encoder(module, source, text_encoder, prompts, storage.text_encoder))
        text_encoders[text_encoder.component] = graph
    on_stage("capturing the VAE decoder", 0, 0)
    decoder = make_vae_decoder(source, storage.dtype, dynamic_size, storage.vae)
    latents = samples.model_inputs[-1][:1]
    others.append(check_vae_decoder(*decoder, latents))
    if storage.vae is not None:
        others.append(rounded_vae_decoder(decoder[1], source, latents, storage.vae))
    encoder = None
    if vae_encoder:
        on_stage("capturing the VAE encoder", 0, 0)
        encoder = make_vae_encoder(source, storage.dtype, dynamic_size, storage.vae)
        others.append(check_vae_encoder(*encoder, decoder[1], latents))
        if storage.vae is not None:
            others.append(rounded_vae_encoder(encoder[1], source, latents, storage.vae))
    if dynamic_size:
        on_stage("parity, another size", 0, 0)
        others += check_other_size(denoiser, decoder, encoder, plan, samples, reference)
    report = ParityReport(criteria=(*report.criteria, *others))
    return Components(text_encoders, denoiser, decoder[0], encoder[0] if encoder else None), report, samples


def _parity_steps(calls: int, seconds_per_call: float) -> list[int]:
    """The steps that parity looks at: all, or for a slow model as many, evenly spread, as a few minutes allow."""
    affordable = int(_PARITY_SECONDS / (_PARITY_RUNS * max(seconds_per_call, 1e-6)))
    count = min(calls, max(affordable, _FEWEST_PARITY_STEPS))
    return sorted({round(step) for step in np.linspace(0, calls - 1, count)})
