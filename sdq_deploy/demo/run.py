"""The demo's stages: train, export and build as a user's commands do; then images, figures, the report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from sdq_deploy.demo.images import package_images, teacher_images, untrained_images
from sdq_deploy.demo.latency import measure_latencies
from sdq_deploy.demo.pictures import draw_pictures
from sdq_deploy.demo.report import DemoReport
from sdq_deploy.demo.state import Demo, DemoSettings
from sdq_deploy.display.consoles import status_console
from sdq_deploy.display.export import ExportDisplay
from sdq_deploy.exporting import export_named
from sdq_deploy.models import EMBEDDED, resolve_model
from sdq_deploy.recipes.load import parse_assignments
from sdq_deploy.shapes64 import CaptionSeed, held_out_pairs
from sdq_deploy.training.resolve import resolve_settings
from sdq_deploy.training.run import run_training
from sdq_deploy.training.summary import summary_of
from sdq_engines.files import atomic_write_json, claimed_folder
from sdq_engines.package.layout import SAMPLER
from sdq_engines.package.store import read_manifest
from sdq_export.checkpoint import load_checkpoint
from sdq_export.jobs import ExportSettings
from sdq_export.provenance import tool_versions
from sdq_export.sampler import SamplerPlan
from sdq_export.source import Source, load_source

__all__ = ["run_demo"]

_TOOLS = ("torch", "diffusers", "nvidia-modelopt", "onnxruntime", "openvino", "tensorrt-rtx")


def _show_command(*arguments: str) -> None:
    """What a user would type for what is done next."""
    status_console.print(f"$ sdq-deploy {' '.join(arguments)}", style="cyan", markup=False, soft_wrap=True)


def run_demo(settings: DemoSettings) -> DemoReport:
    """Run the main job on the embedded model at W4A8 and W8A8 and measure what came out.

    Args:
        settings: where, which engines, how many images.

    Raises:
        SdqError: a stage failed, with its reason; finished stages are kept and not done again.
    """
    with claimed_folder(settings.out, "demo", "demo") as out:
        atomic_write_json(out / "demo.json", {"kind": "sdq-demo"})
        return _run(settings, out)


def _run(settings: DemoSettings, out: Path) -> DemoReport:
    demo = Demo(settings)
    for precision, run, package in (("w4a8", "run", "package"), ("w8a8", "run-w8a8", "package-w8a8")):
        _train_and_export(demo, precision, out / run, out / package)

    with demo.stage("images"):
        pairs, source, plan, guidance = _evaluation_inputs(settings, out / "package")
        teacher_images(demo, source, plan, guidance, pairs)
        for precision, package in (("W8A8", "package-w8a8"), ("W4A8", "package")):
            package_images(demo, precision, out / package, pairs)
        untrained_images(demo, source, plan, guidance, pairs)
    with demo.stage("latency"):
        measure_latencies(demo, {"W4A8": out / "package", "W8A8": out / "package-w8a8"})
    with demo.stage("pictures"):
        pictures = draw_pictures(demo, out / "images", pairs)
    return DemoReport(
        model=EMBEDDED,
        sampler=f"{plan.scheduler}, {plan.num_inference_steps} steps",
        guidance_scale=guidance,
        num_images=len(pairs),
        machine=_machine(),
        variants=demo.variants,
        engines=demo.engines,
        stages=demo.stages,
        pictures=pictures,
        notes=demo.notes,
    )


def _train_and_export(demo: Demo, precision: str, run: Path, package: Path) -> None:
    with demo.stage(f"train {precision.upper()}"):
        _train(demo.settings, precision, run)
    with demo.stage(f"export {precision.upper()} and build"):
        _export(demo.settings, run, package)


def _train(settings: DemoSettings, precision: str, run: Path) -> None:
    """The second run takes over the first one's serial dataset; a run that is there is continued."""

    resume, first = (run / "run.json").is_file(), run.with_name("run")
    shown = ["train", EMBEDDED, "--out", str(run), "--precision", precision, "--seed", str(settings.seed)]
    shown += ["--dataset", str(first)] if run != first else []
    shown += [word for assignment in settings.assignments for word in ("--set", assignment)]
    _show_command(*shown, *(["--resume"] if resume else []))
    overrides = parse_assignments(settings.assignments) | {"quantization.precision": precision}
    resolved = resolve_settings(EMBEDDED, run, overrides=overrides, seed=settings.seed, resume=resume)
    run_training(resolved, resume=resume, dataset=first if run != first else None)
    status_console.print(summary_of(load_checkpoint(run).info), markup=False, soft_wrap=True)


def _export(settings: DemoSettings, run: Path, package: Path) -> None:

    engines = [word for engine in settings.engines for word in ("--engine", engine)]
    _show_command("export", str(run), "--out", str(package), *engines)
    with ExportDisplay() as display:
        export_named(str(run), package, ExportSettings(engines=settings.engines), listener=display)


def _evaluation_inputs(
    settings: DemoSettings, package: Path
) -> tuple[Sequence[CaptionSeed], Source, SamplerPlan, float]:

    guidance = read_manifest(package).sampler.guidance_scale
    plan = SamplerPlan.load(package / SAMPLER)
    return held_out_pairs(settings.num_images), load_source(resolve_model(EMBEDDED)), plan, guidance


def _machine() -> dict[str, str]:

    found = {"Python": platform.python_version(), "cores": str(os.cpu_count()), "machine": platform.machine()}
    return found | tool_versions(_TOOLS)
