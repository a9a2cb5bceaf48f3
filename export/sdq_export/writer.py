"""Write a package: graphs, parity, files; nothing is written unless parity holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sdq_engines.errors import SdqError
from sdq_engines.files import atomic_write_bytes, claim_output, folder_kind, remove_empty_parents
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import LICENSE, MANIFEST, NOTICE, SAMPLER, model_file, tokenizer_file
from sdq_engines.package.paths import is_inside
from sdq_engines.package.schema import Manifest, ModelIO, SamplerInfo
from sdq_engines.package.store import Package, read_manifest
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.components import (
    Components,
    make_denoiser,
    make_reference,
    make_text_encoder,
    make_vae_decoder,
    make_vae_encoder,
)
from sdq_export.parity import ParityReport, TeacherSamples, check_graphs, record_teacher
from sdq_export.parity.components import check_text_encoder, check_vae_decoder, check_vae_encoder
from sdq_export.parity.other_size import check_other_size
from sdq_export.parity.prologue import round_prologue_
from sdq_export.parity.rounded import rounded_text_encoder, rounded_vae_decoder, rounded_vae_encoder
from sdq_export.parity.samples import PARITY_PROMPTS
from sdq_export.passes.prologue import prologue_names
from sdq_export.provenance import notice, source_info, tool_versions
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.scratch import scratch_in
from sdq_export.source import Source
from sdq_export.storage import Dtype, IntegerDtype, Storage
from sdq_export.tokenizer import text_info, tokenizer_json

__all__ = ["ExportResult", "OnStage", "export_package", "sampler_info"]

_STAGING = ".staging-"

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
    with _claimed(out) as folder, _staging(folder) as staging:
        source.family.check_source(source)
        _check_encoder(source, vae_encoder)
        free_size = _free_size(source) if dynamic_size else {}
        components, report, samples = _make(
            source, plan, guidance_scale, checkpoint, storage, prompts, vae_encoder, dynamic_size, on_stage
        )
        report.require()
        on_stage("writing", 0, 0)
        manifest = _manifest(folder, source, plan, guidance_scale, checkpoint, dtype, components, report, free_size)
        package = _write(folder, staging, source, plan, components, manifest)
    return ExportResult(package, report, plan, samples)


def _check_encoder(source: Source, vae_encoder: bool) -> None:
    if source.family.extra_channels(source.skeleton) and not vae_encoder:
        raise SdqError(
            "An inpainting model needs its VAE encoder: it takes the masked image's latents.",
            "Leave --no-vae-encoder out.",
        )


def _free_size(source: Source) -> dict[str, int]:
    """What the manifest says of a free size, in pixels."""
    family, pixels = source.family, source.family.pixels_per_latent(source)
    limit = family.latent_limit(source.skeleton)
    found = {"size_multiple": family.latent_multiple(source.skeleton) * pixels}
    return found if limit is None else {**found, "size_limit": limit * pixels}


def _check_match(source: Source, plan: SamplerPlan, checkpoint: QuantizedCheckpoint | None) -> None:
    if checkpoint is None:
        return
    if checkpoint.info.source.sha256 != source.sha256:
        raise SdqError(
            f"The quantized checkpoint was trained from another {source.model}: its denoiser's hash is not the same.",
            "Export it beside the checkpoint that it was trained from, or train it again.",
        )
    if plan.calls != checkpoint.spec.num_steps:
        raise SdqError(
            f"The checkpoint has scales for {checkpoint.spec.num_steps} model calls, this sampler makes {plan.calls}.",
            "Export it with the scheduler and steps that it was trained with.",
        )


@contextlib.contextmanager
def _claimed(out: str | Path) -> Iterator[Path]:
    """The output folder, checked at the start; if the export fails, it is again what it was."""
    existed, was_package = Path(out).exists(), folder_kind(out) == "package"
    folder = claim_output(out, "package")
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            if not was_package:
                (folder / MANIFEST).unlink(missing_ok=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()
        raise


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


def _manifest(
    folder: Path,
    source: Source,
    plan: SamplerPlan,
    guidance_scale: float,
    checkpoint: QuantizedCheckpoint | None,
    dtype: Dtype,
    components: Components,
    report: ParityReport,
    free_size: Mapping[str, int],
) -> Manifest:
    family = source.family
    return Manifest(
        name=folder.resolve().name,
        family=family.name,
        precision=checkpoint.spec.precision if checkpoint else dtype,
        io=ModelIO(
            latent_shape=family.latent_shape(source),
            image_size=family.image_size(source),
            prologue_inputs=[value.name or "" for value in components.denoiser.prologue.graph.inputs],
            prologue_outputs=prologue_names(components.denoiser.prologue),
            force_zeros_for_empty_prompt=family.zeros_for_no_prompt(source),
            **free_size,
            extra_channels=family.extra_channels(source.skeleton),
        ),
        text=[text_info(source, encoder) for encoder in family.text_encoders],
        sampler=sampler_info(plan, guidance_scale),
        source=source_info(source, checkpoint),
        components={name: model_file(name) for name in components.by_name()},
        full_precision=[name for name in family.full_precision(source) if name in components.by_name()],
        tools=tool_versions(),
        files={},
        fidelity={"parity": report.to_manifest()},
    )


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


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside the package's files for what is not theirs yet; what a killed export left is removed.

    The output is marked as a package in the making before anything is put there, so that it can be claimed again.
    """
    if folder_kind(folder) != "package":
        PackageEditor.create(folder)
    for killed in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(killed, ignore_errors=True)
    staging = folder / f"{_STAGING}{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        with scratch_in(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(
    folder: Path, staging: Path, source: Source, plan: SamplerPlan, components: Components, manifest: Manifest
) -> Package:
    """Write all files aside, check them, then put them in the place of what is there.

    A full disk is met before a package that is already here is touched.
    """
    _stage(staging / "new", source, plan, components, manifest)
    return _swap(folder, staging / "new", staging / "old", manifest)


def _swap(folder: Path, new: Path, old: Path, manifest: Manifest) -> Package:
    """Move the package's files out to `old` and those of `new` in, the manifest last.

    A failure or Ctrl-C on the way puts everything back; a kill leaves the package marked as incomplete.
    """
    marker, before = (folder / MANIFEST).read_bytes(), _files_of(folder)
    editor = PackageEditor.create(folder)
    try:
        for relative in before:
            _move(folder, old, relative)
        for file in sorted(path for path in new.rglob("*") if path.is_file()):
            editor.move_file(file.relative_to(new).as_posix(), file)
        return editor.commit(manifest)
    except BaseException:
        editor.abandon()
        for relative in before:
            _move(old, folder, relative)
        atomic_write_bytes(folder / MANIFEST, marker)
        raise


def _stage(staging: Path, source: Source, plan: SamplerPlan, components: Components, manifest: Manifest) -> None:
    """Every file but the manifest, under its name in the package."""
    for name, model in components.by_name().items():
        onnx.checker.check_model(str(save_graph(model, staging / name)), full_check=True)
    files = {
        **{
            tokenizer_file(encoder.tokenizer): tokenizer_json(
                source.part(encoder.tokenizer), encoder.length(source)
            ).encode("utf-8")
            for encoder in source.family.text_encoders
        },
        SAMPLER: plan.to_bytes(),
        NOTICE: notice(source, manifest.source).encode("utf-8"),
    }
    if source.license_file is not None:
        files[LICENSE] = source.license_file.read_bytes()
    for relative, content in files.items():
        path = staging.joinpath(*relative.split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _files_of(folder: Path) -> set[str]:
    """What the package that is here lists, but for names that lead outside of it."""
    with contextlib.suppress(SdqError):
        return {relative for relative in read_manifest(folder).files if is_inside(relative)}
    return set()


def _move(source: Path, target: Path, relative: str) -> None:
    """Move a file, if it is there, to the same place in another folder of this disk; no empty folder stays behind."""
    path, moved = (root.joinpath(*relative.split("/")) for root in (source, target))
    if path.is_file():
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, moved)
        remove_empty_parents(path, source)
