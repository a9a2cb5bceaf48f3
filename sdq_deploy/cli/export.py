"""`sdq-deploy export`: a run or a model becomes a package, with engines if asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from sdq_deploy.cli.prompt_options import ClipSkipOption, EmbeddingOption, PromptChunksOption
from sdq_deploy.cli.shared import (
    ConfigOption,
    JsonOption,
    VaeFromOption,
    console,
    new_progress,
    new_status,
    print_json,
    require_extra,
    status_console,
)
from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import Package
    from sdq_export.checkpoint import QuantizedCheckpoint
    from sdq_export.devices import DeviceChoice
    from sdq_export.parity import GateChoice, ParityReport
    from sdq_export.sampler import SamplerPlan
    from sdq_export.single_file import FromFile
    from sdq_export.source import Source
    from sdq_export.storage import IntegerDtype
    from sdq_export.writer import ExportResult, OnStage

__all__ = ["register"]


@dataclass(frozen=True)
class _Job:
    """What there is to export."""

    source: Source
    plan: SamplerPlan
    guidance_scale: float
    checkpoint: QuantizedCheckpoint | None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A finished training run, or a model (diffusers folder, hub id, one .safetensors file, shapes-64) "
            "to export unquantized.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The package's folder.", show_default=False)],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="An engine to build too: auto, tensorrt, tensorrt-rtx, openvino, ...; repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="How floating-point weights are stored: fp16, or fp32 (an unquantized model only).")
    ] = "fp16",
    prologue: Annotated[
        str | None, typer.Option(help="How a RUN stores what depends on prompts alone: fp16, int8 or int4.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="How text encoders are stored: fp16, int8 (half the bytes) or int4.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="How the VAE is stored: fp16 or int8 (half the bytes).")] = None,
    scheduler: Annotated[str | None, typer.Option(help="The sampler of a MODEL. If not given, its own.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="The steps of a MODEL. If not given, its pipeline's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The package's default. If not given, the run's or the pipeline's.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="MIN,OPT,MAX", help="The images of a call of the engines.")] = "1,1,4",
    vae_encoder: Annotated[
        bool,
        typer.Option("--vae-encoder/--no-vae-encoder", help="Whether the package may start from images (run --image)."),
    ] = True,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave height and width free, for engines of other sizes (--size).")
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="An image size of the engines, with --dynamic-size; repeatable, as in build.",
        ),
    ] = None,
    prompt_chunks: PromptChunksOption = None,
    clip_skip: ClipSkipOption = None,
    embedding: EmbeddingOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Where the model that the RUN was trained from is now, if it was moved.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    vae_from: VaeFromOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    gate: Annotated[
        str,
        typer.Option(
            metavar="auto|full|CALLS",
            help="How much of a run the parity gate looks at: every step, or as much as this number of calls of the "
            "denoiser allows. auto is every step of a small model, 12 calls of a large one.",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where the model runs for the gate: auto (a GPU if torch has one), cpu or cuda.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Export although memory or disk do not seem to suffice.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Export a quantized run, or a model as it is, as a package; nothing is written unless the graphs prove faithful.

    Example: sdq-deploy export RUN --out package --engine openvino --engine tensorrt-rtx
    """
    from sdq_engines.backends.registry import check_engine_name
    from sdq_engines.build import choose_engine
    from sdq_engines.runtime.arguments import as_number
    from sdq_engines.sizes import parse_size, profile_of_sizes

    stored, looked_at, where = _dtype(dtype), _gate(gate), _device(device)
    integers = (
        _integers("--prologue", prologue, stored, "int8", "int4"),
        _integers("--text-encoder", text_encoder, stored, "int8", "int4"),
        _integers("--vae", vae, stored, "int8"),
    )
    profile = profile_of_sizes(_profile(batch), [parse_size(text) for text in size or []])
    if size and not dynamic_size:
        raise SdqError("--size needs graphs whose size is free.", "Add --dynamic-size.")
    for name in engine or []:
        check_engine_name(name)
    for name in engine or []:
        choose_engine(name)  # what cannot be built here is said before anything is read
    require_extra("train", "torch", "diffusers", "transformers", "onnxscript", "onnxruntime")
    from sdq_deploy.libraries import quiet_libraries

    quiet_libraries()
    from sdq_export.single_file import FromFile, is_single_file

    from_file = FromFile.of(config, vae_from)
    if model is not None and not _is_run(source):
        raise SdqError(f"--model names the model of a RUN, and {source} is none.", "Leave --model out.")
    job = (
        _open_run(source, scheduler, num_inference_steps, stored, model, from_file)
        if _is_run(source)
        else _open_model(source, revision, scheduler, num_inference_steps, from_file)
    )
    precision = job.checkpoint.spec.precision if job.checkpoint else stored
    engines = list(dict.fromkeys(choose_engine(name, precision) for name in engine or []))
    source_told = _with_text(job, source, prompt_chunks, clip_skip, embedding or [])
    with _stages() as on_stage:
        from sdq_export.provenance import what_is_missing
        from sdq_export.writer import export_package

        result = export_package(
            source_told,
            out,
            job.plan,
            job.guidance_scale if guidance_scale is None else as_number(guidance_scale, "--guidance-scale"),
            checkpoint=job.checkpoint,
            dtype=stored,
            vae_encoder=vae_encoder,
            dynamic_size=dynamic_size,
            prologue=integers[0],
            text_encoder=integers[1],
            vae=integers[2],
            gate=looked_at,
            device=where,
            engines=engines,
            force=force,
            on_stage=on_stage,
            on_notice=lambda sentence: status_console.print(sentence, markup=False, soft_wrap=True),
        )
    if not json:
        _print_parity(result.report)
    if is_single_file(source):
        status_console.print((job.source.folder / "NOTICE").read_text(encoding="utf-8").strip(), markup=False)
    if missing := what_is_missing(job.source):
        status_console.print(missing, markup=False, soft_wrap=True)
    package = result.package
    for name in engines:
        package = _build(result, package, name, profile, quiet=json)
    _finish(package, json)


def _dtype(name: str) -> Literal["fp32", "fp16"]:
    if name in ("fp32", "fp16"):
        return cast(Literal["fp32", "fp16"], name)
    raise SdqError(f"There is no dtype {name!r}.", "Give --dtype fp16 or --dtype fp32.")


def _gate(name: str) -> GateChoice:
    if name in ("auto", "full"):
        return cast(Literal["auto", "full"], name)
    if name.isdecimal() and int(name) > 0:
        return int(name)
    raise SdqError(f"--gate takes auto, full, or a number of calls from 1 on, not {name!r}.", "For example --gate 24")


def _device(name: str) -> DeviceChoice:
    if name in ("auto", "cpu", "cuda"):
        return cast("DeviceChoice", name)
    raise SdqError(f"--device takes auto, cpu or cuda, not {name!r}.", "Leave it out to take a GPU where there is one.")


def _integers(option: str, name: str | None, dtype: str, *kinds: IntegerDtype) -> IntegerDtype | None:
    """Which integers store an option's weights; None for floating point, as `dtype` says."""
    for kind in kinds:
        if name == kind:
            return kind
    if name is None or name == dtype == "fp16":
        return None
    raise SdqError(
        f"{option} takes {' or '.join(kinds)}, not {name!r}.", f"Leave it out for {dtype}, as --dtype has it."
    )


def _profile(batch: str) -> ShapeProfile:
    from pydantic import ValidationError

    from sdq_engines.package.schema import ShapeProfile

    try:
        low, best, high = (int(part) for part in batch.split(","))
        profile = ShapeProfile(batch_min=low, batch_opt=best, batch_max=high)
    except (ValueError, ValidationError) as error:
        raise SdqError(
            f"--batch takes three whole numbers from 1 on, MIN,OPT,MAX; {batch!r} is not that.",
            "For example --batch 1,1,4",
        ) from error
    if not low <= best <= high:
        raise SdqError(f"--batch wants MIN <= OPT <= MAX; {batch} is not ordered.", "For example --batch 1,1,4")
    return profile


def _is_run(source: str) -> bool:
    """A training run, finished or not, or a quantized checkpoint alone."""
    folder = Path(source)
    return any((folder / name).is_file() for name in ("run.json", "quant.json"))


def _open_run(
    run: str, scheduler: str | None, steps: int | None, dtype: str, model: str | None, from_file: FromFile
) -> _Job:
    """The source, sampler, guidance and tensors of a finished run."""
    import diffusers

    from sdq_deploy.models import open_run_model
    from sdq_deploy.training.folder import RunFolder
    from sdq_export.checkpoint import load_checkpoint
    from sdq_export.sampler import compile_sampler

    RunFolder(Path(run)).require_finished()
    checkpoint = load_checkpoint(run)
    settings = checkpoint.info.sampler
    if dtype != "fp16":
        raise SdqError("A quantized run stores its other weights in FP16.", "Leave --dtype out, or export the MODEL.")
    _require_same_sampler(settings.scheduler, settings.num_inference_steps, scheduler, steps)
    source = open_run_model(run, checkpoint.info.source, model, from_file)
    made = getattr(diffusers, settings.scheduler).from_config(settings.config)
    plan = compile_sampler(made, settings.num_inference_steps)
    return _Job(source, plan, settings.guidance_scale, checkpoint)


def _with_text(job: _Job, run: str, prompt_chunks: int | None, clip_skip: int | None, embeddings: list[str]) -> Source:
    """The source, its prompts read as the options say, else as they were in training.

    Raises:
        SdqError: a number out of range, an embedding that does not fit, another clip_skip than the training's.
    """
    from sdq_export.checkpoint import load_embeddings
    from sdq_export.embeddings import parse_embedding
    from sdq_export.text_settings import text_settings

    trained = job.checkpoint.info.text if job.checkpoint else None
    text = text_settings(trained, prompt_chunks, clip_skip)
    learned = load_embeddings(run) if job.checkpoint else []
    return job.source.with_text(text, [*learned, *(parse_embedding(each) for each in embeddings)])


def _require_same_sampler(trained: str, trained_steps: int, scheduler: str | None, steps: int | None) -> None:
    """Steps and scheduler belong to the training: the scales were learned for them."""
    from sdq_export.sampler import make_scheduler

    asked = type(make_scheduler(scheduler, {})).__name__ if scheduler is not None else trained
    if asked != trained or (steps is not None and steps != trained_steps):
        raise SdqError(
            f"The run was trained for {trained} with {trained_steps} steps; its scales hold for no other sampler.",
            "Leave --scheduler and --num-inference-steps out, or train again with them.",
        )


def _open_model(
    model: str, revision: str | None, scheduler: str | None, steps: int | None, from_file: FromFile
) -> _Job:
    """The source and sampler of an unquantized export."""
    from sdq_deploy.models import open_model
    from sdq_export.sampler import compile_sampler

    source = open_model(model, revision, from_file)
    plan = compile_sampler(source.scheduler_named(scheduler), source.family.default_steps if steps is None else steps)
    return _Job(source, plan, source.family.guidance(source), None)


@contextmanager
def _stages() -> Iterator[OnStage]:
    """One bar a stage, as the export reports them; a stage that cannot be counted pulses."""
    with new_progress() as progress:
        tasks: dict[str, Any] = {}

        def on_stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                for task in tasks.values():
                    progress.update(
                        task, total=progress.tasks[task].total or 1, completed=progress.tasks[task].total or 1
                    )
                tasks[name] = progress.add_task(name, total=total or None)
            progress.update(tasks[name], completed=done)

        yield on_stage
        for task in tasks.values():
            total = progress.tasks[task].total or 1
            progress.update(task, total=total, completed=total)


def _print_parity(report: ParityReport) -> None:
    """One line a criterion: its figure over all steps, its worst step, and the limit."""
    from rich.table import Table

    table = Table("parity", "overall", "worst step", "limit", "steps", "worst at", box=None, pad_edge=False)
    for criterion in report.criteria:
        mean = sum(criterion.per_step) / len(criterion.per_step)
        table.add_row(
            criterion.name,
            f"{mean if criterion.overall is None else criterion.overall:.3g}",
            f"{criterion.worst:.3g}",
            f"{criterion.limit:.3g}",
            str(len(criterion.steps)),
            criterion.worst_at,
        )
    status_console.print(table)


def _build(result: ExportResult, package: Package, engine: str, profile: ShapeProfile, quiet: bool) -> Package:
    """Build an engine and, where this machine can run it, hold it to parity's last criterion."""
    from sdq_engines.build import build_engine
    from sdq_export.engines import check_built_engine

    with new_status(f"{engine}: starting") as status:
        package = build_engine(
            package,
            engine,
            profile,
            on_progress=lambda component, stage: status.update(f"{engine}: {stage} {component}"),
        )
        status.update(f"{engine}: parity")
        package, criterion = check_built_engine(package, engine, result)
    if not quiet:
        entry = package.manifest.engines[engine]
        proof = (
            f"parity {criterion.overall:.3f} (at most {criterion.limit})"
            if criterion
            else "parity not measured: it does not run here"
        )
        console.print(f"{engine}  {entry.version}, built in {entry.build_seconds:.1f} s, {proof}", soft_wrap=True)
    return package


def _finish(package: Package, json: bool) -> None:
    if json:
        print_json({"package": str(package.folder), **package.manifest.model_dump(mode="json", exclude={"files"})})
        return
    size = sum(entry.size for entry in package.manifest.files.values())
    engines = ", ".join(package.manifest.engines) or "none; add one: sdq-deploy build PACKAGE --engine auto"
    console.print(
        f"{package.folder}  {package.manifest.precision}, {size / 1e6:.1f} MB, engines: {engines}", soft_wrap=True
    )
