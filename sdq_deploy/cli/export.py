"""`sdq-deploy export`: a run or a model becomes a package, with engines if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sdq_deploy.cli.options import (
    ClipSkipOption,
    ConfigOption,
    EmbeddingOption,
    JsonOption,
    PromptChunksOption,
    RevisionOption,
    VaeFromOption,
)
from sdq_deploy.cli.shared import print_json, require_extra
from sdq_deploy.display.consoles import console
from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import Package
    from sdq_export.devices import DeviceChoice
    from sdq_export.parity import GateChoice
    from sdq_export.storage import Dtype, IntegerDtype

__all__ = ["register"]


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
    revision: RevisionOption = None,
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
    from sdq_engines.arguments import as_number
    from sdq_engines.backends.registry import check_engine_name
    from sdq_engines.build import choose_engine
    from sdq_engines.sizes import parse_size, profile_of_sizes

    stored = _dtype(dtype)
    prologue_integers = _integers("--prologue", prologue, stored, "int8", "int4")
    text_integers = _integers("--text-encoder", text_encoder, stored, "int8", "int4")
    vae_integers = _integers("--vae", vae, stored, "int8")
    looked_at, where = _gate(gate), _device(device)
    profile = profile_of_sizes(_profile(batch), [parse_size(text) for text in size or []])
    if size and not dynamic_size:
        raise SdqError("--size needs graphs whose size is free.", "Add --dynamic-size.")
    for name in engine or []:
        check_engine_name(name)
    for name in engine or []:
        choose_engine(name)  # what cannot be built here is said before anything is read
    require_extra("train", "torch", "diffusers", "transformers", "onnxscript", "onnxruntime")
    from sdq_deploy.display.export import ExportDisplay
    from sdq_deploy.exporting import export_named
    from sdq_export.embeddings import parse_embedding
    from sdq_export.jobs import ExportSettings
    from sdq_export.single_file import FromFile

    settings = ExportSettings(
        dtype=stored,
        prologue=prologue_integers,
        text_encoder=text_integers,
        vae=vae_integers,
        vae_encoder=vae_encoder,
        dynamic_size=dynamic_size,
        gate=looked_at,
        device=where,
        engines=tuple(engine or ()),
        force=force,
        scheduler=scheduler,
        num_inference_steps=num_inference_steps,
        guidance_scale=None if guidance_scale is None else as_number(guidance_scale, "--guidance-scale"),
        prompt_chunks=prompt_chunks,
        clip_skip=clip_skip,
        embeddings=tuple(parse_embedding(each) for each in embedding or ()),
        profile=profile,
    )
    from_file = FromFile.of(config, vae_from)
    with ExportDisplay(None if json else console) as display:
        result = export_named(
            source, out, settings, model=model, revision=revision, from_file=from_file, listener=display
        )
    _finish(result.package, json)


def _dtype(name: str) -> Dtype:
    if name in ("fp32", "fp16"):
        return cast("Dtype", name)
    raise SdqError(f"There is no dtype {name!r}.", "Give --dtype fp16 or --dtype fp32.")


def _gate(name: str) -> GateChoice:
    if name in ("auto", "full"):
        return cast("GateChoice", name)
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


def _finish(package: Package, json: bool) -> None:
    if json:
        print_json({"package": str(package.folder), **package.manifest.model_dump(mode="json", exclude={"files"})})
        return
    size = sum(entry.size for entry in package.manifest.files.values())
    engines = ", ".join(package.manifest.engines) or "none; add one: sdq-deploy build PACKAGE --engine auto"
    console.print(
        f"{package.folder}  {package.manifest.precision}, {size / 1e6:.1f} MB, engines: {engines}", soft_wrap=True
    )
