"""`sdq-deploy bench`: the time of a package's parts, and of diffusers beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sdq_deploy.cli.options import ConfigOption, JsonOption, PackageArgument, VaeFromOption
from sdq_deploy.cli.package_output import milliseconds, print_bench, say, stage_shower
from sdq_deploy.cli.shared import print_json, require_extra
from sdq_deploy.display.consoles import new_status

__all__ = ["bench"]


def bench(
    package: PackageArgument,
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
            stage = stage_shower(status, name)
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
