"""`sdq-deploy demo`: the whole road on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdq_deploy.cli.options import AssignmentsOption, JsonOption
from sdq_deploy.cli.shared import print_json, require_extra
from sdq_deploy.display.consoles import console
from sdq_deploy.models import EMBEDDED

__all__ = ["register"]

_ENGINES = ("onnxruntime", "openvino", "tensorrt-rtx")


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel="Start here")(demo)


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="The folder to write; what is finished in it is not made again.")
    ] = Path("build/demo"),
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help=f"An engine to build and compare; repeatable. If not given, {', '.join(_ENGINES)}."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=8, help="How many images are compared, each of a prompt that training has not seen.")
    ] = 64,
    max_train_steps: Annotated[
        int | None, typer.Option(min=0, help="Train fewer steps than the recipe, for a quick look.")
    ] = None,
    assignments: AssignmentsOption = None,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    json: JsonOption = False,
) -> None:
    """Train, export, build, run and compare on the embedded model, in a few minutes on a laptop's CPU.

    Example: sdq-deploy demo --out build/demo
    """
    require_extra("train", "torch", "diffusers", "modelopt", "torchmetrics", "jinja2")
    from sdq_deploy.demo.report import engine_table, variant_table, write_report
    from sdq_deploy.demo.run import run_demo
    from sdq_deploy.demo.state import DemoSettings
    from sdq_deploy.recipes.load import load_recipe, parse_assignments
    from sdq_engines.build import choose_engine

    # Before minutes of training: every engine is one, and can be built here, and every value is allowed.
    load_recipe(EMBEDDED, parse_assignments(assignments or []))
    engines = tuple(dict.fromkeys(choose_engine(name) for name in engine or _ENGINES))

    values = list(assignments or [])
    if max_train_steps is not None:
        values.append(f"fit.max_train_steps={max_train_steps}")
    settings = DemoSettings(
        out=out,
        engines=engines,
        num_images=images,
        assignments=tuple(values),
        seed=seed,
    )
    try:
        report = run_demo(settings)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("Run the same command again: finished stages are kept.") from interrupt
    page = write_report(report, out)
    if json:
        print_json(report.model_dump())
        return
    console.print(variant_table(report))
    console.print(engine_table(report))
    total = sum(stage.seconds for stage in report.stages)
    console.print(f"{total / 60:.1f} minutes. Look at {page}", soft_wrap=True)
    console.print(f'Make an image: sdq-deploy run {out / "package"} "a red circle" --seed 7', soft_wrap=True)
