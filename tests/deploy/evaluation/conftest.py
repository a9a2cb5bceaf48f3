"""Candidates made from the tiny model once a session: a quantized checkpoint and packages. Not to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdq_export.source import Source, load_source

GUIDANCE = 4.0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDQ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def source(tiny_sd: Path) -> Source:
    """The tiny model."""
    return load_source(tiny_sd)


@pytest.fixture(scope="session")
def checkpoint(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W8A8 checkpoint for 3 steps of DPM++ 2M."""
    from sdq_export.checkpoint import save_checkpoint
    from sdq_export.sampler import compile_sampler, make_scheduler
    from tests.export.quantized import quantized_checkpoint

    plan = compile_sampler(make_scheduler("dpmpp-2m", source.scheduler.config), 3)
    made = quantized_checkpoint(source, plan, "w8a8")
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    save_checkpoint(folder, made.info, made.tensors)
    return folder


@pytest.fixture(scope="session")
def float_package(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in FP32 with 4 steps of a sampler that draws noise, on ONNX Runtime."""
    from sdq_engines.build import build_engine
    from sdq_export.sampler import compile_sampler, make_scheduler
    from sdq_export.settings import PackageSettings
    from sdq_export.writer import export_package

    plan = compile_sampler(make_scheduler("euler-ancestral", source.scheduler.config), 4)
    out = tmp_path_factory.mktemp("packages") / "float"
    package = export_package(source, out, plan, GUIDANCE, PackageSettings(dtype="fp32")).package
    return build_engine(package, "onnxruntime").folder
