"""Every family's road by its own recipe: train a few steps, export, build, run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.context import TrainingSettings
from sdq_deploy.training.dataset import load_split
from sdq_deploy.training.folder import RunFolder
from sdq_deploy.training.resolve import default_recipe
from sdq_deploy.training.result import read_result
from sdq_deploy.training.run import run_training
from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.package.layout import PROLOGUE
from sdq_engines.package.store import open_package
from sdq_export.checkpoint import load_checkpoint
from sdq_export.engines import check_built_engine
from sdq_export.sampler import compile_sampler, make_scheduler
from sdq_export.source import load_source
from sdq_export.writer import export_package

pytestmark = pytest.mark.slow

#: Fewer of everything; what the recipe says of scheduler, precisions, losses and rates stays.
FEWER = {
    "sampling.num_inference_steps": 3,
    "collect.num_prompts": 4,
    "collect.validation_prompts": 2,
    "collect.steps_per_prompt": 2,
    "calibrate.samples_per_step": 2,
    "calibrate.search_points": 10,
    "sensitivity.samples": 2,
    "sensitivity.top_k": 4,
    "fit.max_train_steps": 4,
    "fit.batch_size": 2,
    "fit.validate_every": 2,
    "fit.warmup_steps": 1,
}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its mixed precision for the life of a process; a command has one to itself, a test has not."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("name", "recipe"), [("sd2", "sd"), ("sdxl", "sdxl"), ("sd3", "sd3")])
def test_train_export_build_run(name: str, recipe: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny(name), tmp_path / "run"
    assert default_recipe(str(model)) == recipe
    prompts = tuple(f"a red circle number {index}" for index in range(6))
    settings = TrainingSettings(model=str(model), out=out, recipe=load_recipe(recipe, FEWER), prompts=prompts)
    run_training(settings, cpu=True, quiet=True)
    checkpoint, source = load_checkpoint(out), load_source(model)
    assert checkpoint.spec.precision == "w4a8"
    assert not any("time_" in name or "add_embedding" in name for name in checkpoint.tensors)
    result = read_result(RunFolder(out).fit)
    assert result["best_db"] >= result["start_db"] > 3

    sampler = checkpoint.info.sampler
    scheduler = make_scheduler(None, {"_class_name": sampler.scheduler, **sampler.config})
    plan = compile_sampler(scheduler, sampler.num_inference_steps)
    written = export_package(source, tmp_path / "package", plan, sampler.guidance_scale, checkpoint=checkpoint)
    package = written.package
    for engine in ("onnxruntime", "openvino", "tensorrt-rtx"):
        package, criterion = check_built_engine(build_engine(package, engine), engine, written)
        assert criterion is None or criterion.passed
    built = open_package(package.folder).manifest
    assert set(built.engines) == {"onnxruntime", "openvino", "tensorrt-rtx"}
    for engine in ("tensorrt-rtx", "openvino"):
        kernels = built.engines[engine].kernels
        assert kernels is not None
        assert kernels.int8 >= 0.95 * kernels.quantized_layers, engine
    stored = onnx.load(package.component(PROLOGUE)).graph.initializer
    assert {each.data_type for each in stored if np.prod(each.dims) > 1000} == {onnx.TensorProto.FLOAT16}
    images = [np.asarray(_image(Pipeline.from_package(package, name)), float) for name in ("onnxruntime", "openvino")]
    assert images[0].std() > 1
    assert np.abs(images[0] - images[1]).mean() < 12


def _image(pipe: Pipeline) -> Image.Image:
    return pipe(["a red circle", "blue"], negative_prompt="green", seed=7).images[1]


def test_the_empty_prompt_of_sdxl_is_zeros(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny("sdxl"), tmp_path / "run"
    recipe = load_recipe("sdxl", FEWER | {"fit.max_train_steps": 0, "sensitivity.top_k": 1})
    run_training(
        TrainingSettings(model=str(model), out=out, recipe=recipe, prompts=("a red circle", "blue")),
        cpu=True, quiet=True,
    )  # fmt: skip
    data = load_split(out / "dataset", "training")
    assert {name: tuple(each.shape) for name, each in data.empty.tensors.items()} == {
        "text_embeddings": (1, 16, 80),
        "pooled_embeddings": (1, 40),
        "time_ids": (1, 6),
    }
    assert float(data.empty.tensors["text_embeddings"].abs().max()) == 0
    assert float(data.empty.tensors["pooled_embeddings"].abs().max()) == 0
    assert data.empty.tensors["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    assert 0 <= RunFolder(out).read_status()["stages"]["precompute"]["measured"]["error"] < 1e-5
