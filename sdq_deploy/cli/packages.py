"""Commands that need a package and no torch: run, build, inspect, verify, doctor, bench."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from sdq_deploy.cli.package_output import (
    StepBar,
    megabytes,
    milliseconds,
    print_bench,
    print_engine,
    print_evaluation,
    print_parity,
    say,
)
from sdq_deploy.cli.prompt_options import (
    NegativePrompt2Option,
    NegativePrompt3Option,
    Prompt2Option,
    Prompt3Option,
    WeightingOption,
)
from sdq_deploy.cli.shared import ConfigOption, JsonOption, VaeFromOption, print_json, require_extra
from sdq_deploy.display.consoles import new_progress, new_status, status_console

if TYPE_CHECKING:
    from sdq_deploy.display.progress import Status
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import Package
    from sdq_engines.runtime.pipeline import PipelineOutput

__all__ = ["register"]

_PackageArgument = Annotated[Path, typer.Argument(help="The package's folder.", show_default=False)]
_EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", help="auto (the fastest that works here), tensorrt, tensorrt-rtx, openvino or onnxruntime."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    for command in (run, build, inspect, verify, doctor, bench):
        app.command(rich_help_panel="Packages (no torch needed)")(command)


def run(
    package: _PackageArgument,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The PNG file to write; several images get -0, -1, … before .png.")
    ] = Path("image.png"),
    engine: _EngineOption = "auto",
    seed: Annotated[int | None, typer.Option(help="Image i starts from seed + i. If not given, a random seed.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    prompt_2: Prompt2Option = None,
    prompt_3: Prompt3Option = None,
    negative_prompt_2: NegativePrompt2Option = None,
    negative_prompt_3: NegativePrompt3Option = None,
    weighting: WeightingOption = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="How strongly images follow the prompt. If not given, the package's own; 1 or less is no guidance."
        ),
    ] = None,
    num_images_per_prompt: Annotated[
        int, typer.Option("--num-images-per-prompt", "-n", min=1, help="Images of each prompt.")
    ] = 1,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from this image instead of noise.", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Paint only where this image is white; with --image.", show_default=False),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image to repaint, above 0 to 1. If not given, what diffusers' pipeline takes: without "
            "and with a mask 0.8 and 1 (Stable Diffusion 1 and 2), 0.3 and 0.9999 (XL), 0.6 and 0.6 (3)."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels, within what the engine was built for.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, within what the engine was built for.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="A package takes no other than its own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A package takes no other than its own.")] = None,
    verify: Annotated[
        str,
        typer.Option(
            help="full hashes every file first; cached hashes those that have changed since the last check here."
        ),
    ] = "cached",
    json: JsonOption = False,
) -> None:
    """Make images with a package.

    Example: sdq-deploy run package "a red circle on a blue background" --seed 7 --out image.png

    From an image: sdq-deploy run package "a red circle" --image photo.png --strength 0.6 [--mask mask.png]
    """
    from sdq_engines.runtime.pipeline import Pipeline

    started = time.perf_counter()
    _check_output(out)
    pipeline = Pipeline.load(package, engine=engine, verify=_verify_mode(verify))
    loaded = time.perf_counter()
    with StepBar(pipeline, len(prompt) * num_images_per_prompt) as bar:
        result = pipeline(
            prompt,
            negative_prompt=negative_prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            prompt_weighting=weighting,
            seed=seed,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            image=image,
            mask_image=mask,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            callback=bar,
        )
    files = _save(result, out)
    seconds = {"load": round(loaded - started, 3), "images": round(time.perf_counter() - loaded, 3)}
    if json:
        print_json({"engine": pipeline.engine, "images": files, "seeds": result.seeds, "seconds": seconds})
        return
    for file, number in zip(files, result.seeds, strict=True):
        say(f"{file}  seed {number}", markup=False)
    status_console.print(f"{pipeline.engine}: loaded in {seconds['load']} s, images in {seconds['images']} s")


def build(
    package: _PackageArgument,
    engine: Annotated[
        list[str],
        typer.Option("--engine", help="The engine: auto, tensorrt, tensorrt-rtx, openvino or onnxruntime; repeatable."),
    ],
    batch_min: Annotated[int, typer.Option(min=1, help="The fewest images of a call.")] = 1,
    batch_opt: Annotated[int, typer.Option(min=1, help="The images of a call that the engine is tuned for.")] = 1,
    batch_max: Annotated[int, typer.Option(min=1, help="The most images of a call.")] = 4,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="An image size; repeatable. The engine takes every size from the least to the most of these, and is "
            "tuned for the first. If not given, the package's own; others need an export with --dynamic-size.",
        ),
    ] = None,
    fp32: Annotated[
        list[str] | None,
        typer.Option(
            "--fp32",
            help="A part of the package that is computed in FP32 throughout; repeatable. For NVIDIA engines for "
            "example vae_decoder, for openvino the denoiser, whose long attention is in BF16 otherwise.",
        ),
    ] = None,
    bf16: Annotated[
        list[str] | None,
        typer.Option(
            "--bf16",
            help="A part of the package that NVIDIA engines compute in BF16, for example text_encoder_3; repeatable.",
        ),
    ] = None,
    sm: Annotated[
        list[int] | None,
        typer.Option(
            "--sm",
            help="An NVIDIA architecture that a tensorrt-rtx engine is for, for example 89 (Ada) or 120 (Blackwell); "
            "repeatable. If not given, every one from 80 on that can compute the package.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add engines to a package. Needs no torch, so it runs on the machine that will use them.

    Example: sdq-deploy build package --engine tensorrt-rtx --batch-max 4 --size 512x512 --size 768x512
    """
    from sdq_engines.backends.registry import backend, check_engine_name
    from sdq_engines.build import check_options, choose_engine
    from sdq_engines.package.schema import ShapeProfile
    from sdq_engines.package.store import open_package
    from sdq_engines.sizes import parse_size, profile_of_sizes

    for name in engine:
        check_engine_name(name)
    checked = open_package(package)
    names = list(dict.fromkeys(choose_engine(name, checked.manifest.precision) for name in engine))
    _check_components([*(fp32 or []), *(bf16 or [])], list(checked.manifest.components))
    profile = ShapeProfile(batch_min=batch_min, batch_opt=batch_opt, batch_max=batch_max)
    profile = profile_of_sizes(profile, [parse_size(text) for text in size or []])
    options = {name: value for name, value in (("fp32", fp32), ("bf16", bf16), ("sm", sm)) if value}
    check_options(options, names)
    for name in names:
        honoured = {option: value for option, value in options.items() if option in backend(name).build_options}
        checked = _build_one(checked, name, profile, honoured)
        if not json:
            print_engine(name, checked.manifest.engines[name].model_dump())
    if json:
        print_json({name: checked.manifest.engines[name].model_dump(mode="json") for name in names})


def inspect(package: _PackageArgument, json: JsonOption = False) -> None:
    """Show what a package says about itself. No file but its manifest is read.

    Example: sdq-deploy inspect package
    """
    from sdq_engines.package.store import read_manifest
    from sdq_engines.summary import summary

    content = summary(read_manifest(package))
    if json:
        print_json(content)
        return
    sampler, source, io = content["sampler"], content["source"], content["io"]
    say(
        f"[bold]{content['name']}[/]  {content['precision']}, {content['family']}, "
        f"{io['image_size'][1]}x{io['image_size'][0]} pixels"
    )
    say(
        f"sampler  {sampler['scheduler']}, {sampler['num_inference_steps']} steps, guidance {sampler['guidance_scale']}"
    )
    chunks, skipped = (max((text[key] for text in content["text"]), default=0) for key in ("chunks", "clip_skip"))
    if chunks > 1 or skipped:
        say(f"prompts  {chunks} chunk(s) of {content['text'][0]['max_length']} tokens, clip_skip {skipped}")
    say(f"source   {source['model']}, licence {source['license']}. {source['changes']}", markup=False)
    for part, size in content["bytes"].items():
        say(f"  {part:24} {megabytes(size)}")
    if parity := content["fidelity"].get("parity"):
        say("parity, as measured by the export")
        print_parity(parity)
    if evaluation := content["fidelity"].get("evaluation"):
        print_evaluation(evaluation)
    for name, entry in content["engines"].items():
        print_engine(name, entry)


def verify(package: _PackageArgument, json: JsonOption = False) -> None:
    """Check a package: its manifest, its paths and the hash of every file.

    Example: sdq-deploy verify package
    """
    from sdq_engines.package.store import open_package, read_manifest

    manifest = read_manifest(package)
    total = sum(entry.size for entry in manifest.files.values())
    with new_progress() as progress:
        task = progress.add_task("hashing", total=max(total, 1))
        open_package(package, on_bytes=lambda size: progress.advance(task, size))
    if json:
        print_json({"ok": True, "files": len(manifest.files), "bytes": total})
    else:
        say(f"{package}: {len(manifest.files)} files, {megabytes(total)}, all as the manifest says.")


def doctor(json: JsonOption = False) -> None:
    """Say which engines work on this machine, and why the others do not.

    Example: sdq-deploy doctor
    """
    from dataclasses import asdict

    from sdq_engines.doctor import diagnose

    found = diagnose()
    if json:
        print_json(asdict(found))
        return
    say(f"Python {found.python}, {found.platform}")
    for name, engine in found.engines.items():
        if engine.works:
            say(f"[green]works[/]  {name:13} {engine.version}  {engine.device}")
        else:
            builds = " (builds here)" if engine.builds else ""
            say(f"[red]no[/]     {name:13} {engine.reason}{builds}")
            say(f"       {'':13} {engine.hint}", markup=False)
    say(f"auto takes: {found.auto or 'nothing; install an engine first'}")


def bench(
    package: _PackageArgument,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="An engine to time; repeatable. If not given, all of the package that work here."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="The images of a call.")] = 1,
    runs: Annotated[int, typer.Option(min=3, help="How often each part is timed, after it has run a few times.")] = 10,
    against: Annotated[
        str | None, typer.Option(help="Also time diffusers with this MODEL, in FP32 (needs the extra train).")
    ] = None,
    config: ConfigOption = None,
    vae_from: VaeFromOption = None,
    json: JsonOption = False,
) -> None:
    """Time a package: the median of each part and of the whole call.

    Example: sdq-deploy bench package --engine openvino --against shapes-64
    """
    from sdq_engines.backends.registry import backend
    from sdq_engines.bench import bench as measure
    from sdq_engines.package.store import open_package
    from sdq_engines.runtime.pipeline import Pipeline

    checked = open_package(package, verify="cached")
    names = engine or [name for name in checked.manifest.engines if backend(name).available().works] or ["auto"]
    reports: list[dict[str, Any]] = []
    with new_status("starting") as status:
        for name in names:
            stage = _stage_shower(status, name)
            reports.append(measure(partial(Pipeline.from_package, checked, name), batch, runs, stage).as_dict())
            if not json:
                print_bench(reports[-1])
        eager = None
        if against is not None:
            status.update("diffusers: loading")
            eager = _time_diffusers(against, config, vae_from, checked.manifest, batch, runs)
    if json:
        print_json({"engines": reports, "diffusers": eager})
    elif eager is not None:
        say(
            f"[bold]diffusers[/], eager FP32: denoiser {milliseconds(eager['denoiser'])} a step, "
            f"end to end {milliseconds(eager['end_to_end'])}"
        )


def _build_one(package: Package, name: str, profile: ShapeProfile, options: dict[str, Any]) -> Package:
    from sdq_engines.build import build_engine

    with new_status(f"{name}: starting") as status:
        show = _stage_shower(status, name)
        return build_engine(package, name, profile, options, lambda part, stage: show(f"{stage} {part}"))


def _stage_shower(status: Status, name: str) -> Callable[[str], None]:
    """What a long command is doing, beside its spinner."""
    return lambda stage: status.update(f"{name}: {stage}")


def _verify_mode(value: str) -> Literal["full", "cached"]:
    if value not in ("full", "cached"):
        raise typer.BadParameter(f"{value!r} is neither full nor cached", param_hint="--verify")
    return cast('Literal["full", "cached"]', value)


def _check_components(names: list[str], known: list[str]) -> None:
    from sdq_engines.errors import SdqError

    for name in names:
        if name not in known:
            raise SdqError(f"There is no component {name!r}.", f"Components: {', '.join(known)}.")


def _check_output(out: Path) -> None:
    """Before a model is loaded: the images can be written where they shall go."""
    from sdq_engines.errors import SdqError
    from sdq_engines.files import make_writable

    if out.is_dir():
        raise SdqError(f"--out {out} is a folder; a file is wanted.", "Give a file: --out image.png")
    if out.suffix.lower() != ".png":
        raise SdqError(
            f"--out {out} does not end in .png, and PNG is the one format in which images are written.",
            f"Give --out {out.with_suffix('.png')}",
        )
    make_writable(out.parent)


def _save(result: PipelineOutput, out: Path) -> list[str]:
    from sdq_engines.files import atomic_write

    files = []
    for index, image in enumerate(result.images):
        path = out if len(result.images) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG")
        files.append(str(path))
    return files


def _time_diffusers(
    model: str, config: str | None, vae_from: Path | None, manifest: Any, batch: int, runs: int
) -> dict[str, Any]:
    require_extra("train", "torch", "diffusers", "transformers")
    from dataclasses import asdict

    from sdq_deploy.evaluation.eager import time_eager
    from sdq_deploy.libraries import quiet_libraries
    from sdq_deploy.models import open_model
    from sdq_export.single_file import FromFile

    quiet_libraries()
    source = open_model(model, from_file=FromFile.of(config, vae_from))
    return {name: asdict(timing) for name, timing in time_eager(source, manifest, batch, runs).items()}
