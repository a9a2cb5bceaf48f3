"""The demo's figures of speed: every engine of its packages, and diffusers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdq_deploy.demo.report import EngineFigures
from sdq_deploy.demo.state import Demo
from sdq_deploy.display.consoles import new_status
from sdq_deploy.evaluation.eager import time_eager
from sdq_deploy.models import EMBEDDED, resolve_model
from sdq_engines import Pipeline
from sdq_engines.backends.registry import backend
from sdq_engines.bench import bench
from sdq_engines.package.layout import DENOISER
from sdq_engines.package.store import Package, open_package
from sdq_export.source import load_source

__all__ = ["measure_latencies"]


def measure_latencies(demo: Demo, packages: Mapping[str, Path]) -> None:

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
