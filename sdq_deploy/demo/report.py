"""The demo's report: typed figures, a table for the terminal, and a page that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from sdq_deploy.pages.render import file_uri, render_page
from sdq_deploy.tables import new_table
from sdq_engines.files import atomic_write_text

__all__ = [
    "DemoReport",
    "EngineFigures",
    "Picture",
    "Stage",
    "Variant",
    "engine_table",
    "variant_table",
    "write_report",
]


class Stage(BaseModel):
    """One stage of the demo and its wall time in seconds."""

    name: str
    seconds: float


class Variant(BaseModel):
    """One way to make the images, measured against the floating-point model's on held-out prompts."""

    name: str
    images_by: str
    """What made the images, e.g. "diffusers, FP32" or "package, openvino"."""
    psnr_mean: float | None = None
    psnr_worst: float | None = None
    ssim_mean: float | None = None
    ssim_worst: float | None = None
    caption_accuracy: float
    denoiser_bytes: int | None = None
    package_bytes: int | None = None


class EngineFigures(BaseModel):
    """One engine of one package: what its kernels compute with, and how fast it is here."""

    package: str
    engine: str
    bytes_on_disk: int | None = None
    build_seconds: float | None = None
    quantized_layers: int | None = None
    int8_layers: int | None = None
    int4_layers: int | None = None
    fallback: list[str] = []
    step_ms: float | None = None
    image_s: float | None = None
    why_not_run: str | None = None
    """Why there is no latency: the reason that the engine gives here."""


class Picture(BaseModel):
    """An image file of the report and what it shows."""

    file: str
    title: str
    text: str


class DemoReport(BaseModel):
    """Everything that the demo measured."""

    model: str
    sampler: str
    guidance_scale: float
    num_images: int
    machine: dict[str, str]
    variants: list[Variant]
    engines: list[EngineFigures]
    stages: list[Stage]
    pictures: list[Picture]
    notes: list[str] = []


def _number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f} MB"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def variant_table(report: DemoReport) -> Table:
    """Fidelity of each variant, for the terminal."""
    table = new_table(
        f"Fidelity to the floating-point images, {report.num_images} held-out prompts",
        [""],
        ["PSNR", "worst", "SSIM", "worst", "captions", "denoiser", "package"],
    )
    for row in report.variants:
        table.add_row(
            row.name,
            _number(row.psnr_mean, 1, " dB"),
            _number(row.psnr_worst, 1, " dB"),
            _number(row.ssim_mean, 4),
            _number(row.ssim_worst, 4),
            _percent(row.caption_accuracy),
            _megabytes(row.denoiser_bytes),
            _megabytes(row.package_bytes),
        )
    return table


def _kernels(row: EngineFigures) -> str:
    if row.quantized_layers is None or row.int8_layers is None:
        return "–"
    int4 = f", INT4 {row.int4_layers}" if row.int4_layers else ""
    return f"INT8 {row.int8_layers}/{row.quantized_layers}{int4}"


def engine_table(report: DemoReport) -> Table:
    """Kernels and latency of each engine, for the terminal."""
    table = new_table("Engines", ["package", "engine"], ["kernels", "on disk", "built in", "a step", "an image"])
    for row in report.engines:
        table.add_row(
            row.package,
            row.engine,
            _kernels(row),
            _megabytes(row.bytes_on_disk),
            _number(row.build_seconds, 1, " s"),
            _number(row.step_ms, 1, " ms") if row.why_not_run is None else "built only",
            _number(row.image_s, 2, " s"),
        )
    return table


def write_report(report: DemoReport, folder: Path) -> Path:
    """Write report.json and report.html, whose pictures are inside it; return the page's path."""
    filters: dict[str, Any] = {"number": _number, "megabytes": _megabytes, "percent": _percent, "kernels": _kernels}
    sources = [file_uri(folder / picture.file) for picture in report.pictures]
    page = render_page("sdq_deploy.demo", "report.html.j2", {"report": report, "sources": sources}, filters)
    atomic_write_text(folder / "report.json", report.model_dump_json(indent=2))
    atomic_write_text(folder / "report.html", page)
    return folder / "report.html"
