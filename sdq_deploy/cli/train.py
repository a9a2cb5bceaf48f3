"""`sdq-deploy train`: quantization-aware training, by the serial-to-parallel pipeline or by one of its peers."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sdq_deploy.cli.options import (
    AssignmentsOption,
    ClipSkipOption,
    ConfigOption,
    CpuOption,
    EmbeddingOption,
    JsonOption,
    PromptChunksOption,
    RevisionOption,
    VaeFromOption,
)
from sdq_deploy.cli.shared import print_json, require_extra
from sdq_deploy.display.consoles import console
from sdq_engines.formats import PrecisionName

__all__ = ["register"]


class _Method(enum.StrEnum):
    s2p = "s2p"
    ptq = "ptq"
    ptq_reconstruction = "ptq-reconstruction"
    efficientdm = "efficientdm"


class _PtqAlgorithm(enum.StrEnum):
    search = "search"
    max = "max"
    mse = "mse"
    percentile = "percentile"
    smoothquant = "smoothquant"
    awq = "awq"
    svdquant = "svdquant"


class _Pipeline(enum.StrEnum):
    serial_to_parallel = "serial-to-parallel"
    parallel = "parallel"
    serial = "serial"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="train")(train)


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The model to quantize: a diffusers folder, a hub id, one .safetensors file, or shapes-64.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="RUN", help="The folder to write. It holds the whole training: a run.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="The settings: a recipe's name, or a TOML file. If not given, the recipe of the model's family.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A text file with one prompt a line, or a table: .csv, .tsv, .jsonl or .parquet."
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option("--prompt-column", help="The table's column. If not given: prompt, caption or text.")
    ] = None,
    precision: Annotated[
        PrecisionName | None,
        typer.Option("--precision", help="The bits of weights (w) and of activations (a); fp8 is E4M3 for both."),
    ] = None,
    method: Annotated[
        _Method | None,
        typer.Option(
            "--method", help="How weights are rounded and scales are found. If not given, s2p, which trains both."
        ),
    ] = None,
    ptq_algorithm: Annotated[
        _PtqAlgorithm | None,
        typer.Option("--ptq-algorithm", help="Which algorithm --method ptq uses. It chooses that method, too."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="The sampler to train for: ddim, pndm, euler, ... If not given, the recipe's."
        ),
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num-inference-steps", help="The sampling steps to train for. If not given, the recipe's."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="The guidance to train for; 1 is none. If not given, the recipe's."),
    ] = None,
    max_train_steps: Annotated[
        int | None,
        typer.Option(
            "--max-train-steps", help="How many steps to train; 0 calibrates only. If not given, the recipe's."
        ),
    ] = None,
    pipeline: Annotated[
        _Pipeline | None,
        typer.Option(
            "--pipeline",
            help="Which latents training sees: those of the model's inference (serial-to-parallel), of noised images "
            "(parallel), or of the quantized model's inference (serial).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of data and training. If not given, 0.")] = None,
    assignments: AssignmentsOption = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset", metavar="RUN", help="Take over the latents that another run has collected, as far as they fit."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE[=WEIGHT]", help="Fuse an adapter into the model before training; repeatable."
        ),
    ] = None,
    embedding: EmbeddingOption = None,
    clip_skip: ClipSkipOption = None,
    prompt_chunks: PromptChunksOption = None,
    config: ConfigOption = None,
    vae_from: VaeFromOption = None,
    revision: RevisionOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the training that RUN holds, with its own settings where none are given here."
        ),
    ] = False,
    cpu: CpuOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say which layers are quantized, and how much disk, memory and time it would take."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train a quantized denoiser. The result is RUN/checkpoint, which export reads.

    On several GPUs: accelerate launch --multi_gpu --num_processes 2 -m sdq_deploy.cli.main train ...

    Example: sdq-deploy train shapes-64 --out build/run --precision w4a8
    """
    require_extra("train", "torch", "diffusers", "transformers", "accelerate", "modelopt", "tensorboard", "matplotlib")
    from sdq_deploy.lora import parse_lora
    from sdq_deploy.recipes.load import parse_assignments
    from sdq_deploy.training.resolve import resolve_settings
    from sdq_deploy.training.run import run_training
    from sdq_export.single_file import FromFile

    values: dict[str, tuple[str, Any]] = {
        "method": ("--method", method or (None if ptq_algorithm is None else _Method.ptq)),
        "ptq.algorithm": ("--ptq-algorithm", ptq_algorithm),
        "quantization.precision": ("--precision", precision),
        "text.clip_skip": ("--clip-skip", clip_skip),
        "text.prompt_chunks": ("--prompt-chunks", prompt_chunks),
        "sampling.scheduler": ("--scheduler", scheduler),
        "sampling.num_inference_steps": ("--num-inference-steps", num_inference_steps),
        "sampling.guidance_scale": ("--guidance-scale", guidance_scale),
        "fit.max_train_steps": ("--max-train-steps", max_train_steps),
        "fit.pipeline": ("--pipeline", pipeline),
    }
    given = {key: (option, value) for key, (option, value) in values.items() if value is not None}
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, (_, value) in given.items()}
    overrides = parse_assignments(assignments or []) | plain
    settings = resolve_settings(
        model,
        out,
        recipe=recipe,
        overrides=overrides,
        options={key: option for key, (option, _) in given.items()},
        prompt_file=prompts,
        prompt_column=prompt_column,
        seed=seed,
        revision=revision,
        embeddings=embedding or [],
        loras=[parse_lora(text) for text in lora or []],
        from_file=FromFile.of(config, vae_from),
        resume=resume,
    )
    if dry_run:
        from sdq_deploy.cli.forecast import print_forecast
        from sdq_deploy.libraries import quiet_libraries
        from sdq_deploy.training.forecast import forecast

        quiet_libraries()
        print_forecast(forecast(settings), json)
        return
    ran = run_training(settings, resume=resume, dataset=dataset, cpu=cpu)
    _print_result(out, ran, json)


def _print_result(out: Path, ran: list[str], as_json: bool) -> None:
    from accelerate import PartialState

    from sdq_deploy.training.summary import summary_of
    from sdq_export.checkpoint import load_checkpoint

    if not PartialState().is_main_process:
        return
    info = load_checkpoint(out).info
    if as_json:
        print_json({"run": str(out), "precision": info.spec.precision, "stages_run": ran, **info.notes})
        return
    console.print(summary_of(info), markup=False, soft_wrap=True)
    if not ran:
        console.print("Nothing had changed; no stage was run again.")
    console.print(f"Checkpoint: {out / 'checkpoint'}\nNext: sdq-deploy export {out} --out PACKAGE", markup=False)
