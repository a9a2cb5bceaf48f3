"""One source, one capture, a few packages: tracing is the slow part of these tests, so a session traces once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_export.sampler import SamplerPlan, compile_sampler, make_scheduler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.writer import ExportResult, export_package
from tests.export.quantized import quantized_checkpoint

GUIDANCE, OTHER_STEPS = 4.0, 8


@pytest.fixture(scope="session")
def source(tiny_sd: Path) -> Source:
    """The tiny model, loaded."""
    return load_source(tiny_sd)


@pytest.fixture(scope="session")
def captured_denoiser(source: Source) -> ir.Model:
    """The captured UNet; take a clone of it."""
    family = source.family
    tokens = source.part("tokenizer").model_max_length
    return family.capture_denoiser(source.denoiser, family.latent_shape(source), tokens)


@pytest.fixture
def captured(captured_denoiser: ir.Model) -> ir.Model:
    """A captured UNet to edit."""
    return captured_denoiser.clone()


def plan_of(source: Source, name: str, steps: int = 6) -> SamplerPlan:
    """A sampler by its command-line name."""
    return compile_sampler(make_scheduler(name, source.scheduler.config), steps)


@pytest.fixture(scope="session")
def float_package(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """FP32, PNDM."""
    out = tmp_path_factory.mktemp("packages") / "fp32"
    return export_package(source, out, plan_of(source, "pndm"), GUIDANCE, PackageSettings(dtype="fp32"))


@pytest.fixture(scope="session")
def quantized_package(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """W4A8 with per-step scales, DPM++ 2M."""
    plan = plan_of(source, "dpmpp-2m")
    out = tmp_path_factory.mktemp("packages") / "w4a8"
    return export_package(source, out, plan, GUIDANCE, checkpoint=quantized_checkpoint(source, plan, "w4a8"))


@pytest.fixture(scope="session", params=["sdxl", "sd3"])
def other_family(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Pipeline]:
    """Another family's checkpoint and its FP32 package on onnxruntime, with the checkpoint's own scheduler."""
    folder, source = tmp_path_factory.mktemp(request.param), load_source(tiny(request.param))
    plan = compile_sampler(source.scheduler, OTHER_STEPS)
    made = export_package(source, folder / "package", plan, GUIDANCE, PackageSettings(dtype="fp32"))
    return source, Pipeline.from_package(build_engine(made.package, "onnxruntime"), "onnxruntime")
