"""The demo's stages: train, export and build as a user's commands do; then images, figures, the report."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdq_deploy.demo.report import DemoReport, EngineFigures, Picture, Stage, Variant
from sdq_deploy.display.consoles import new_progress, new_status, status_console
from sdq_deploy.evaluation.grids import comparison_grid
from sdq_deploy.evaluation.metrics import compare_images
from sdq_deploy.models import EMBEDDED, resolve_model
from sdq_engines.files import atomic_write, atomic_write_json, claimed_folder
from sdq_engines.guidance import Guidance
from sdq_engines.package.layout import DENOISER, PROLOGUE

if TYPE_CHECKING:
    from sdq_deploy.shapes64 import CaptionSeed
    from sdq_engines.package.store import Package
    from sdq_export.sampler import SamplerPlan
    from sdq_export.source import Source

__all__ = ["DemoSettings", "run_demo"]

Images = NDArray[np.uint8]

_TOOLS = ("torch", "diffusers", "nvidia-modelopt", "onnxruntime", "openvino", "tensorrt-rtx")
_GRID_COLUMNS = 8


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does and how much of it."""

    out: Path
    engines: tuple[str, ...] = ("onnxruntime", "openvino", "tensorrt-rtx")
    num_images: int = 64
    assignments: tuple[str, ...] = ()
    """Values of the recipe, KEY=VALUE each, for both precisions."""
    seed: int = 0


@dataclass
class _Demo:
    """What the stages hand on."""

    settings: DemoSettings
    stages: list[Stage] = field(default_factory=list)
    images: dict[str, Images] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    engines: list[EngineFigures] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and record how long it took."""
        status_console.rule(f"[bold]{name}", align="left")
        started = time.perf_counter()
        yield
        self.stages.append(Stage(name=name, seconds=round(time.perf_counter() - started, 2)))


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
    demo = _Demo(settings)
    for precision, run, package in (("w4a8", "run", "package"), ("w8a8", "run-w8a8", "package-w8a8")):
        _train_and_export(demo, precision, out / run, out / package)

    with demo.stage("images"):
        pairs, source, plan, guidance = _evaluation_inputs(settings, out / "package")
        _teacher_images(demo, source, plan, guidance, pairs)
        for precision, package in (("W8A8", "package-w8a8"), ("W4A8", "package")):
            _package_images(demo, precision, out / package, pairs)
        _untrained_images(demo, source, plan, guidance, pairs)
    with demo.stage("latency"):
        _latencies(demo, {"W4A8": out / "package", "W8A8": out / "package-w8a8"})
    with demo.stage("pictures"):
        pictures = _draw(demo, out / "images", pairs)
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


def _train_and_export(demo: _Demo, precision: str, run: Path, package: Path) -> None:
    with demo.stage(f"train {precision.upper()}"):
        _train(demo.settings, precision, run)
    with demo.stage(f"export {precision.upper()} and build"):
        _export(demo.settings, run, package)


def _train(settings: DemoSettings, precision: str, run: Path) -> None:
    """The second run takes over the first one's serial dataset; a run that is there is continued."""
    from sdq_deploy.recipes.load import parse_assignments
    from sdq_deploy.training.resolve import resolve_settings
    from sdq_deploy.training.run import run_training
    from sdq_deploy.training.summary import summary_of
    from sdq_export.checkpoint import load_checkpoint

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
    from sdq_deploy.display.export import ExportDisplay
    from sdq_deploy.exporting import export_named
    from sdq_export.jobs import ExportSettings

    engines = [word for engine in settings.engines for word in ("--engine", engine)]
    _show_command("export", str(run), "--out", str(package), *engines)
    with ExportDisplay() as display:
        export_named(str(run), package, ExportSettings(engines=settings.engines), listener=display)


def _evaluation_inputs(
    settings: DemoSettings, package: Path
) -> tuple[Sequence[CaptionSeed], Source, SamplerPlan, float]:
    from sdq_deploy.shapes64 import held_out_pairs
    from sdq_engines.package.layout import SAMPLER
    from sdq_engines.package.store import read_manifest
    from sdq_export.sampler import SamplerPlan
    from sdq_export.source import load_source

    guidance = read_manifest(package).sampler.guidance_scale
    plan = SamplerPlan.load(package / SAMPLER)
    return held_out_pairs(settings.num_images), load_source(resolve_model(EMBEDDED)), plan, guidance


def _teacher_images(
    demo: _Demo, source: Source, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> None:
    import torch

    from sdq_export.stepping import StepDenoiser

    teacher = StepDenoiser(source.own(source.family.denoiser), torch.from_numpy(plan.timesteps)).eval()
    weights = sum(file.stat().st_size for file in (source.folder / source.family.denoiser).glob("*.safetensors"))
    images = _torch_images("floating point", source, teacher, plan, guidance, pairs)
    _add_variant(demo, "FP", "torch, FP32", images, pairs, denoiser_bytes=weights)


def _torch_images(
    name: str, source: Source, denoiser: Any, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> Images:
    from sdq_deploy.evaluation.generate import generate_images

    with new_progress() as progress:
        task = progress.add_task(f"images, {name}", total=len(pairs))
        return generate_images(
            source,
            denoiser,
            plan,
            [pair.prompt for pair in pairs],
            [pair.seed for pair in pairs],
            Guidance.classifier_free(guidance),
            progress=lambda count: progress.advance(task, count),
        )


def _package_images(demo: _Demo, precision: str, folder: Path, pairs: Sequence[CaptionSeed]) -> None:
    """Images by the runtime that a user runs: no torch in it."""
    from sdq_engines import Pipeline

    pipe = Pipeline.load(folder)
    with new_progress() as progress:
        batches = -(-len(pairs) // pipe.session.entry.profile.batch_max)
        task = progress.add_task(f"images, {precision}, {pipe.engine}", total=batches * pipe.manifest.sampler.num_calls)
        result = pipe(
            [pair.prompt for pair in pairs],
            seed=[pair.seed for pair in pairs],
            callback=lambda event: progress.advance(task),
        )
    images = np.stack([np.asarray(image) for image in result.images])
    files = pipe.manifest.files
    _add_variant(
        demo,
        f"{precision} trained",
        f"package, {pipe.engine}",
        images,
        pairs,
        denoiser_bytes=_bytes_of(files, DENOISER, PROLOGUE),
        package_bytes=pipe.manifest.bytes_without_engines,
    )


def _bytes_of(files: Mapping[str, Any], *components: str) -> int:
    return sum(entry.size for name, entry in files.items() if name.split("/")[0] in components)


def _untrained_images(
    demo: _Demo, source: Source, plan: SamplerPlan, guidance: float, pairs: Sequence[CaptionSeed]
) -> None:
    """W4A8 without training by every initialization we know, on the same sites; the best one stays in the table."""
    import torch

    from sdq_deploy.demo.untrained import ALGORITHMS, quantize_without_training
    from sdq_export.reference import build_reference

    found: dict[str, Images] = {}
    for algorithm, title in ALGORITHMS.items():
        info, tensors = quantize_without_training(demo.settings.out / "run", algorithm)
        student = build_reference(
            source.for_spec(info.spec).own(source.family.denoiser), info.spec, tensors, torch.from_numpy(plan.timesteps)
        )
        found[title] = _torch_images(f"W4A8 untrained, {title}", source, student, plan, guidance, pairs)
    means = {title: float(compare_images(images, demo.images["FP"]).psnr.mean()) for title, images in found.items()}
    best = max(means, key=lambda title: means[title])
    _add_variant(demo, "W4A8 untrained", f"torch, fake quantization, {best}", found[best], pairs)
    listed = ", ".join(f"{title} {mean:.1f} dB" for title, mean in means.items())
    demo.notes.append(f"W4A8 without training, mean PSNR by initialization: {listed}; the table has the best, {best}.")


def _add_variant(
    demo: _Demo,
    name: str,
    images_by: str,
    images: Images,
    pairs: Sequence[CaptionSeed],
    denoiser_bytes: int | None = None,
    package_bytes: int | None = None,
) -> None:
    from sdq_deploy.shapes64.classifier import caption_accuracy

    demo.images[name] = images
    figures = {} if name == "FP" else compare_images(images, demo.images["FP"]).summary()
    figures.pop("identical", None)
    right = caption_accuracy(images, [pair.scene for pair in pairs])
    demo.variants.append(
        Variant(
            name=name,
            images_by=images_by,
            caption_accuracy=float(np.mean(right)),
            denoiser_bytes=denoiser_bytes,
            package_bytes=package_bytes,
            **figures,
        )
    )


def _latencies(demo: _Demo, packages: Mapping[str, Path]) -> None:
    from sdq_deploy.evaluation.eager import time_eager
    from sdq_engines.package.store import open_package
    from sdq_export.source import load_source

    opened = {name: open_package(folder, verify="cached") for name, folder in packages.items()}
    for name, package in opened.items():
        for engine in package.manifest.engines:
            demo.engines.append(_engine_figures(name, package, engine))
    with new_status("diffusers, eager FP32"):
        eager = time_eager(load_source(resolve_model(EMBEDDED)), opened["W4A8"].manifest, batch=1, runs=10)
    demo.engines.append(
        EngineFigures(
            package="FP",
            engine="diffusers, eager",
            step_ms=eager["denoiser"].median * 1e3,
            image_s=eager["end_to_end"].median,
        )
    )


def _engine_figures(name: str, package: Package, engine: str) -> EngineFigures:
    from sdq_engines import Pipeline
    from sdq_engines.backends.registry import backend
    from sdq_engines.bench import bench

    entry = package.manifest.engines[engine]
    figures = EngineFigures(
        package=name, engine=engine, bytes_on_disk=entry.bytes_on_disk, build_seconds=entry.build_seconds
    )
    if entry.kernels is not None:
        # An engine with no integer kernel at all says so by its count; naming every layer would drown the page.
        some = 0 < len(entry.kernels.fallback) < entry.kernels.quantized_layers
        figures = figures.model_copy(
            update={
                "quantized_layers": entry.kernels.quantized_layers,
                "int8_layers": entry.kernels.int8,
                "int4_layers": entry.kernels.int4,
                "fallback": entry.kernels.fallback if some else [],
            }
        )
    found = backend(engine).available()
    if not found.works:
        return figures.model_copy(update={"why_not_run": found.reason})
    with new_status(f"{name}, {engine}") as status:
        report = bench(
            lambda: Pipeline.from_package(package, engine), on_stage=lambda part: status.update(f"{engine}: {part}")
        )
    seconds = {"step_ms": report.components[DENOISER].median * 1e3, "image_s": report.end_to_end.median}
    return figures.model_copy(update=seconds)


def _draw(demo: _Demo, folder: Path, pairs: Sequence[CaptionSeed]) -> list[Picture]:
    """Grids of the first prompts, of those where W4A8 is farthest from FP, and of the differences there."""
    reference = demo.images["FP"]
    order = ["FP", "W8A8 trained", "W4A8 trained", "W4A8 untrained"]
    worst = np.argsort(compare_images(demo.images["W4A8 trained"], reference).psnr)[:_GRID_COLUMNS]
    first = np.arange(min(_GRID_COLUMNS, len(pairs)))
    pictures = []
    for name, title, chosen in (
        ("first", "Same prompts, same seeds", first),
        ("worst", "Where W4A8 trained is farthest from FP", worst),
    ):
        rows = {key.replace(" ", "\n"): demo.images[key][chosen] for key in order}
        _save(comparison_grid(rows), folder / f"{name}.png")
        captions = "; ".join(f"{column + 1}: {pairs[index].prompt}" for column, index in enumerate(chosen))
        pictures.append(Picture(file=f"images/{name}.png", title=title, text=captions))
    differences = {
        key.replace(" ", "\n"): _amplified(demo.images[key][worst], reference[worst]) for key in order if key != "FP"
    }
    _save(comparison_grid(differences), folder / "worst-difference.png")
    pictures.append(
        Picture(
            file="images/worst-difference.png",
            title="The difference there, eight times amplified",
            text="Gray is no difference. The columns are those of the picture above.",
        )
    )
    return pictures


def _amplified(images: Images, reference: Images) -> Images:
    difference = images.astype(np.int16) - reference.astype(np.int16)
    return np.clip(128 + 8 * difference, 0, 255).astype(np.uint8)


def _save(picture: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def _machine() -> dict[str, str]:
    import os

    from sdq_export.provenance import tool_versions

    found = {"Python": platform.python_version(), "cores": str(os.cpu_count()), "machine": platform.machine()}
    return found | tool_versions(_TOOLS)
