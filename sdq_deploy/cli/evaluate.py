"""`sdq-deploy evaluate`: how close candidates come to the floating-point model, and how sure that is."""

from __future__ import annotations

import enum
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdq_deploy.cli.options import ConfigOption, CpuOption, JsonOption, VaeFromOption
from sdq_deploy.cli.shared import print_json, require_extra
from sdq_deploy.display.consoles import console, new_progress, new_status, status_console
from sdq_deploy.models import EMBEDDED
from sdq_engines.errors import SdqError

if TYPE_CHECKING:
    from sdq_deploy.evaluation.candidates import Candidate
    from sdq_deploy.evaluation.prompts import PromptSet
    from sdq_deploy.evaluation.results import EvaluationResults

__all__ = ["register"]

_DEFAULT_IMAGES = 256


class _Split(enum.StrEnum):
    held_out = "held_out"
    validation = "validation"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(evaluate)


def evaluate(
    candidates: Annotated[
        list[str],
        typer.Argument(
            metavar="CANDIDATE...",
            help="What to compare: packages, training runs or models. NAME=PATH gives one a name of its own.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; images in it are used again.")] = Path(
        "build/evaluation"
    ),
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The floating-point model to compare with. If not given, the one that the candidates were made from.",
        ),
    ] = None,
    config: ConfigOption = None,
    vae_from: VaeFromOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A text file with one prompt a line, or a table: .csv, .tsv, .jsonl or .parquet."
        ),
    ] = None,
    split: Annotated[
        _Split | None,
        typer.Option(
            "--split",
            help="Take captions of shapes-64 in place of a file: held_out to report on, validation to choose settings.",
            show_default=False,
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"How many images. If not given, one for each line of the file, or {_DEFAULT_IMAGES} of a split.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image of a file of prompts; image i starts from seed + i.")
    ] = 0,
    engine: Annotated[str, typer.Option("--engine", help="The engine that packages run on.")] = "auto",
    scheduler: Annotated[
        str | None, typer.Option(help="The sampler, where only models are compared; packages and runs have their own.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="The steps, where only models are compared; packages and runs have their own.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The guidance. If not given, the packages' or runs' own.")
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option("--real", metavar="FOLDER", help="A folder of real images, to measure Fréchet distances to them."),
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option("--lpips", metavar="FILE", help="AlexNet's weights, to measure LPIPS.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option("--inception", metavar="FILE", help="Inception's weights, to measure FID.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", metavar="FOLDER", help="A CLIP model's folder, to measure the CLIP score.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="How many images are made together.")] = 8,
    processes: Annotated[int, typer.Option(min=1, help="How many processes make images at once.")] = 1,
    traced: Annotated[
        int, typer.Option(min=0, help="How many images, the first ones, have their latents compared at every step.")
    ] = 256,
    fail_below: Annotated[
        str | None,
        typer.Option(
            metavar="FIGURE=VALUE,...",
            help="Exit with 1 if the mean of one of these figures is lower, for any candidate.",
        ),
    ] = None,
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Store the figures in the packages' manifests.")
    ] = False,
    cpu: CpuOption = False,
    json: JsonOption = False,
) -> None:
    """Compare candidates with the floating-point model: same prompts, same seeds, every figure with its 95 % interval.

    Packages make their images by the torch-free runtime, runs and models by torch. Run the same command again after
    an interruption, or with more images: what is there is used again, unless its candidate has changed.

    Example: sdq-deploy evaluate package --num-images 1024 --processes 2

    Two runs of one model, on your own prompts: sdq-deploy evaluate ours=RUN theirs=OTHER --prompts prompts.txt

    In CI: sdq-deploy evaluate package --fail-below psnr=30,ssim=0.95

    On several GPUs or nodes: accelerate launch --multi_gpu -m sdq_deploy.cli.main evaluate RUN --prompts prompts.txt
    """
    require_extra("train", "torch", "diffusers", "transformers", "torchmetrics", "jinja2")
    from sdq_deploy.evaluation.candidates import find_reference, open_candidates
    from sdq_deploy.evaluation.evaluate import join_processes, run_evaluation, scorers_of
    from sdq_deploy.evaluation.gates import check_measured, failures, parse_limits
    from sdq_deploy.evaluation.manifest import write_manifests
    from sdq_deploy.evaluation.output import claimed, write_results
    from sdq_deploy.evaluation.reading import read_alike
    from sdq_deploy.evaluation.sampling import agree_on_sampler
    from sdq_deploy.evaluation.settings import EvaluationSettings
    from sdq_deploy.libraries import quiet_libraries
    from sdq_export.single_file import FromFile

    limits = parse_limits(fail_below)
    quiet_libraries()
    with new_status("opening the candidates"):
        from_file = FromFile.of(config, vae_from)
        found = open_candidates(candidates, engine, reference, from_file)
        model = find_reference(found, reference, from_file)
        found, model = read_alike(found, model)
        sampler = agree_on_sampler(found, model, scheduler, num_inference_steps, guidance_scale)
        settings = EvaluationSettings(
            out=out,
            candidates=tuple(found),
            reference=model,
            sampler=sampler,
            prompts=_prompts(model, prompts, split, num_images, seed),
            real=real,
            lpips=lpips,
            inception=inception,
            clip=clip,
            batch_size=batch_size,
            processes=processes,
            traced=traced,
            device=_device(cpu),
        )
        scorers = scorers_of(settings)
    check_measured(limits, scorers.names)
    state = join_processes(settings)
    progress = new_progress()
    progress.disable = not state.is_main_process
    with claimed(out) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        try:
            with progress:
                scored = run_evaluation(settings, scorers, progress, state)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt("Run the same command again: finished images are kept.") from interrupt
        if scored is None:
            return
        results, scores = scored
        page = write_results(settings, results, scores)
    written = write_manifests(found, results) if write_manifest else []
    if json:
        print_json(results.model_dump(mode="json"))
    else:
        _print(results, page, written)
    if fallen := failures(results, limits):
        raise SdqError("; ".join(fallen) + ".")


def _prompts(model: Candidate, file: Path | None, split: _Split | None, count: int | None, seed: int) -> PromptSet:
    from sdq_deploy.evaluation.prompts import prompts_of_file, prompts_of_split

    embedded = model.path == EMBEDDED
    if file is not None and split is not None:
        raise SdqError("Prompts come from a file or from a split, not from both.", "Leave --prompts or --split out.")
    if file is not None:
        return prompts_of_file(file, count, seed, shapes=embedded)
    if split is None and not embedded:
        raise SdqError(
            "An evaluation needs prompts like those that the model will be used with, and none were given.",
            "Write them into a text file, one per line, and give it with --prompts FILE.",
        )
    return prompts_of_split((split or _Split.held_out).value, count or _DEFAULT_IMAGES)


def _device(cpu: bool) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"


def _print(results: EvaluationResults, page: Path, manifests: list[str]) -> None:
    from sdq_deploy.evaluation.tables import comparison_table, figure_table

    console.print(figure_table(results))
    if results.comparisons:
        console.print(comparison_table(results))
    for sentence in (*results.skipped, *results.notes):
        status_console.print(sentence, markup=False, soft_wrap=True)
    for folder in manifests:
        console.print(f"Written into the manifest of {folder}.", markup=False, soft_wrap=True)
    console.print(f"Look at {page}", markup=False, soft_wrap=True)
