"""A prologue trained on the INT4 grid: it passes the gate that refuses others, and its integers are in the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.layout import PROLOGUE
from sdq_export.engines import check_built_engine
from sdq_export.integer_storage import prologue_layers
from sdq_export.sampler import compile_sampler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import export_package
from tests.export.quantized import quantized_checkpoint
from tests.tiny import WRITERS

pytestmark = pytest.mark.slow

STEPS, GUIDANCE = 3, 4.0
KEEP = {"sd": ("conv_in", "conv_out"), "sd3": ("pos_embed.proj", "proj_out")}
BLOCKS = {32: 32, 80: 16, 96: 32}
"""Inputs of a layer -> how many share a scale (docs/quantization.md, "Integer weights of what is not quantized")."""


def source_on_the_grid(folder: Path, family: str) -> tuple[Source, list[str]]:
    """A tiny checkpoint whose prologue's weights are -7..7 times a power of two per block, and their layers."""
    source = load_source(WRITERS[family](folder))
    model: Any = source.denoiser
    plan = compile_sampler(source.scheduler, STEPS)
    layers = prologue_layers(StepDenoiser(load_source(folder).denoiser, torch.from_numpy(plan.timesteps)))
    random = np.random.default_rng(3)
    for layer in layers:
        weight = model.get_submodule(layer).weight
        block = BLOCKS[weight.shape[1]]
        integers = random.integers(-7, 8, (weight.shape[0], weight.shape[1] // block, block))
        integers[..., 0] = 7
        scales = 2.0 ** random.integers(-6, -3, (*integers.shape[:2], 1))
        weight.data = torch.from_numpy((integers * scales).reshape(weight.shape)).float()
    model.save_pretrained(folder / source.family.denoiser)
    return load_source(folder), layers


@pytest.mark.parametrize("family", KEEP)
def test_a_prologue_of_int4_numbers_loses_nothing(family: str, tmp_path: Path) -> None:
    source, layers = source_on_the_grid(tmp_path / "model", family)
    plan = compile_sampler(source.scheduler, STEPS)
    checkpoint = quantized_checkpoint(source, plan, "w4a8", keep=KEEP[family])
    made = export_package(
        source, tmp_path / "package", plan, GUIDANCE, PackageSettings(prologue="int4"), checkpoint=checkpoint
    )
    criterion = next(each for each in made.report.criteria if each.name == "int4_prologue")
    assert criterion.details["error"] == [0.0] * len(criterion.per_step)
    assert set(criterion.per_step) == {1.0}
    stored = list(ir.load(made.package.component(PROLOGUE)).graph.initializers.values())
    assert len(layers) == {"sd": 14, "sd3": 10}[family]
    assert sum(value.dtype == ir.DataType.INT4 for value in stored) == len(layers)
    assert not [value.name for value in stored if value.dtype in (ir.DataType.INT8, ir.DataType.FLOAT16)]
    package, images = made.package, []
    for engine in ("onnxruntime", "openvino"):
        package, found = check_built_engine(build_engine(package, engine), engine, made)
        assert found is not None
        assert found.passed
        images.append(np.asarray(Pipeline.load(package.folder, engine=engine)("a red circle", seed=1).images[0]))
    assert images[0].std() > 1
    assert build_engine(package, "tensorrt-rtx").manifest.engines["tensorrt-rtx"]


def test_the_same_gate_refuses_a_prologue_that_is_not_on_the_grid(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_source(tiny("sd3"))
    plan = compile_sampler(source.scheduler, STEPS)
    checkpoint = quantized_checkpoint(source, plan, "w8a8", keep=KEEP["sd3"])
    with pytest.raises(SdqError, match="INT4 prologue"):
        export_package(
            source, tmp_path / "package", plan, GUIDANCE, PackageSettings(prologue="int4"), checkpoint=checkpoint
        )
    assert not (tmp_path / "package").exists()
