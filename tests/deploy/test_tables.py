"""Nothing that a user needs is cut from a table at 80 columns."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from sdq_deploy.demo.report import DemoReport, EngineFigures, Variant, engine_table, variant_table


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_demos_tables_lose_nothing() -> None:
    variant = Variant(
        name="W4A8 untrained", images_by="torch", caption_accuracy=0.9375, psnr_mean=34.04, psnr_worst=13.21,
        ssim_mean=0.96581, ssim_worst=0.43442, denoiser_bytes=16_800_000, package_bytes=114_000_000,
    )  # fmt: skip
    engine = EngineFigures(
        package="W4A8", engine="tensorrt-rtx", bytes_on_disk=156_000_000, build_seconds=113.4, quantized_layers=104,
        int8_layers=104, int4_layers=0, why_not_run="no GPU",
    )  # fmt: skip
    report = DemoReport(
        model="shapes-64", sampler="DDIM", guidance_scale=3, num_images=64, machine={}, variants=[variant],
        engines=[engine, engine.model_copy(update={"engine": "onnxruntime", "why_not_run": None, "step_ms": 10.23,
                                                   "image_s": 0.264})], stages=[], pictures=[],
    )  # fmt: skip
    fidelity = shown(variant_table(report))
    for word in (
        "W4A8 untrained",
        "34.0 dB",
        "13.2 dB",
        "0.9658",
        "0.4344",
        "93.8 %",
        "16.80 MB",
        "114.00 MB",
        "captions",
    ):
        assert word in fidelity, fidelity
    engines = shown(engine_table(report))
    for word in (
        "tensorrt-rtx",
        "onnxruntime",
        "INT8 104/104",
        "156.00 MB",
        "113.4 s",
        "built only",
        "10.2 ms",
        "0.26 s",
    ):
        assert word in engines, engines
    assert "…" not in fidelity + engines
    assert max(map(len, (fidelity + engines).splitlines())) <= 80
