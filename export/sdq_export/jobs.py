"""Exports from loaded checkpoint to package with engines: what `sdq-deploy export`, the demo and other programs call.

source = load_source("FOLDER")
result = export_model(source, "package", ExportSettings(engines=("openvino",), num_inference_steps=20))
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from sdq_engines.build import build_engine, choose_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.schema import EngineEntry, ShapeProfile
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.embeddings import Embedding
from sdq_export.engines import check_built_engine
from sdq_export.parity import Criterion
from sdq_export.provenance import what_is_missing
from sdq_export.sampler import SamplerPlan, compile_sampler, make_scheduler
from sdq_export.settings import PackageSettings
from sdq_export.single_file import is_single_file
from sdq_export.source import Source
from sdq_export.text_settings import text_settings
from sdq_export.writer import ExportResult, export_package

__all__ = ["ExportListener", "ExportSettings", "check_run", "export_model", "export_run"]


@dataclass(frozen=True)
class ExportSettings(PackageSettings):
    """One export: the package, and what it is made for. None is as the run was trained, or as the model's pipeline.

    Attributes:
        scheduler: the sampler, by its name; of a run only the one that it was trained for.
        num_inference_steps: likewise.
        guidance_scale: the package's default.
        prompt_chunks: how many chunks a prompt may have.
        clip_skip: how many of their last layers the CLIP text encoders leave out.
        embeddings: textual inversions, beside those that a run was trained with.
        profile: images per call, and sizes, of the engines.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    prompt_chunks: int | None = None
    clip_skip: int | None = None
    embeddings: tuple[Embedding, ...] = ()
    profile: ShapeProfile = field(default_factory=ShapeProfile)


class ExportListener:
    """Hears how an export goes. This one says nothing; override what should be shown."""

    def stage(self, name: str, done: int, total: int) -> None:
        """A stage's name, how much of it is done, and of how much; 0 of 0 where there is nothing to count."""

    def notice(self, sentence: str) -> None:
        """What a user should know: what the export will take, or what the package lacks."""

    def exported(self, result: ExportResult) -> None:
        """The package is written; its engines, if any, are not built yet."""

    def building(self, engine: str, what: str) -> None:
        """What is being done for an engine."""

    def built(self, engine: str, entry: EngineEntry, criterion: Criterion | None) -> None:
        """An engine is in the package; None where this machine cannot run it, so that parity was not measured."""


def export_run(
    source: Source,
    checkpoint: QuantizedCheckpoint,
    out: str | Path,
    settings: ExportSettings | None = None,
    listener: ExportListener | None = None,
) -> ExportResult:
    """Export a quantized checkpoint, and build engines.

    Args:
        source: the model that it was trained from.
        checkpoint: what training left.
        out: the package's folder: new, empty, or a package to replace.
        settings: what is wanted.
        listener: hears how it goes.

    Raises:
        SdqError: as `export_package` and `build_engine`, and where the settings are not those of the training.
    """
    settings = settings or ExportSettings()
    check_run(checkpoint, settings)
    sampler = checkpoint.info.sampler
    told = source.with_text(
        text_settings(checkpoint.info.text, settings.prompt_chunks, settings.clip_skip),
        [*checkpoint.embeddings, *settings.embeddings],
    )
    guidance_scale = sampler.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    return _export(told, out, sampler.compile(), guidance_scale, settings, checkpoint, listener or ExportListener())


def export_model(
    source: Source,
    out: str | Path,
    settings: ExportSettings | None = None,
    listener: ExportListener | None = None,
) -> ExportResult:
    """Export a model as it is, unquantized, and build engines; arguments and errors as of `export_run`."""
    settings = settings or ExportSettings()
    steps, family = settings.num_inference_steps, source.family
    plan = compile_sampler(source.scheduler_named(settings.scheduler), family.default_steps if steps is None else steps)
    told = source.with_text(text_settings(None, settings.prompt_chunks, settings.clip_skip), settings.embeddings)
    guidance_scale = family.guidance(source) if settings.guidance_scale is None else settings.guidance_scale
    return _export(told, out, plan, guidance_scale, settings, None, listener or ExportListener())


def check_run(checkpoint: QuantizedCheckpoint, settings: ExportSettings) -> None:
    """Refuse settings that are not those of the training: its scales were learned for one sampler.

    Raises:
        SdqError: another scheduler or number of steps, or weights in FP32.
    """
    if settings.dtype != "fp16":
        raise SdqError("A quantized run stores its other weights in FP16.", "Leave --dtype out, or export the MODEL.")
    trained, steps = checkpoint.info.sampler, settings.num_inference_steps
    asked = trained.scheduler
    if settings.scheduler is not None:
        asked = type(make_scheduler(settings.scheduler, {})).__name__
    if asked != trained.scheduler or steps not in (None, trained.num_inference_steps):
        raise SdqError(
            f"The run was trained for {trained.scheduler} with {trained.num_inference_steps} steps; "
            "its scales hold for no other sampler.",
            "Leave --scheduler and --num-inference-steps out, or train again with them.",
        )


def _export(
    source: Source,
    out: str | Path,
    plan: SamplerPlan,
    guidance_scale: float,
    settings: ExportSettings,
    checkpoint: QuantizedCheckpoint | None,
    listener: ExportListener,
) -> ExportResult:
    precision = checkpoint.spec.precision if checkpoint else settings.dtype
    engines = tuple(dict.fromkeys(choose_engine(name, precision) for name in settings.engines))
    result = export_package(
        source, out, plan, guidance_scale, replace(settings, engines=engines),
        checkpoint=checkpoint, on_stage=listener.stage, on_notice=listener.notice,
    )  # fmt: skip
    listener.exported(result)
    if is_single_file(source.model):
        listener.notice((source.folder / "NOTICE").read_text(encoding="utf-8").strip())
    if missing := what_is_missing(source):
        listener.notice(missing)
    for engine in engines:
        result = _with_engine(result, engine, settings.profile, listener)
    return result


def _with_engine(result: ExportResult, engine: str, profile: ShapeProfile, listener: ExportListener) -> ExportResult:
    """Build an engine and, where this machine can run it, hold it to parity's last criterion."""
    listener.building(engine, "starting")
    package = build_engine(
        result.package,
        engine,
        profile,
        on_progress=lambda component, stage: listener.building(engine, f"{stage} {component}"),
    )
    listener.building(engine, "parity")
    package, criterion = check_built_engine(package, engine, result)
    listener.built(engine, package.manifest.engines[engine], criterion)
    return replace(result, package=package)
