"""`sdq-deploy run`: images by a package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from sdq_deploy.cli.options import (
    JsonOption,
    NegativePrompt2Option,
    NegativePrompt3Option,
    PackageArgument,
    Prompt2Option,
    Prompt3Option,
    WeightingOption,
)
from sdq_deploy.cli.package_output import StepBar, say
from sdq_deploy.cli.shared import print_json
from sdq_deploy.display.consoles import status_console

if TYPE_CHECKING:
    from sdq_engines.runtime.pipeline import PipelineOutput

__all__ = ["run"]

_EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", help="auto (the fastest that works here), tensorrt, tensorrt-rtx, openvino or onnxruntime."
    ),
]


def run(
    package: PackageArgument,
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


def _verify_mode(value: str) -> Literal["full", "cached"]:
    if value not in ("full", "cached"):
        raise typer.BadParameter(f"{value!r} is neither full nor cached", param_hint="--verify")
    return cast('Literal["full", "cached"]', value)


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
