"""On an NVIDIA GPU: the TensorRT engines against the reference, with the state on the device and graphs captured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sdq_engines import Pipeline
from sdq_engines.backends.nvidia import cuda
from sdq_engines.backends.registry import backend
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, open_package

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.find_gpu()[0] is None, reason=cuda.find_gpu()[1] or "a GPU was found"),
]
PROMPT = "a red circle on a blue square"


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def engine(request: pytest.FixtureRequest) -> str:
    found = backend(request.param).available()
    if not found.works:
        pytest.skip(found.reason)
    return str(request.param)


def build(package: Package, engine: str, tmp_path: Path) -> Package:
    folder = tmp_path / "gpu"
    shutil.copytree(package.folder, folder)
    return build_engine(open_package(folder), engine, ShapeProfile(batch_max=2))


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
def test_images_equal_the_references(
    built: Callable[[str], Package], engine: str, precision: str, tmp_path: Path
) -> None:
    package = build(built(precision), engine, tmp_path)
    reference = Pipeline.from_package(package, "onnxruntime")(PROMPT, "green", seed=3, num_images_per_prompt=3)
    pipeline = Pipeline.from_package(package, engine)
    made = pipeline(PROMPT, "green", seed=3, num_images_per_prompt=3)
    # FP16 against FP32 over quantized values, four steps: rounding flips cost about the quantization error itself.
    error = np.linalg.norm(made.latents - reference.latents) / np.linalg.norm(reference.latents)
    assert error < 0.05
    again = pipeline(PROMPT, "green", seed=3, num_images_per_prompt=3)  # the captured graph, its state reset
    np.testing.assert_array_equal(again.latents, made.latents)


def test_a_batch_outside_the_profile_is_one_sentence(
    built: Callable[[str], Package], engine: str, tmp_path: Path
) -> None:
    package = build(built("w8a8"), engine, tmp_path)
    pipeline = Pipeline.from_package(package, engine)
    with pytest.raises(SdqError, match="was built for latents"):
        pipeline.decode(np.zeros((3, *package.manifest.io.latent_shape), np.float32))


def test_an_engine_for_another_gpu_is_refused(built: Callable[[str], Package], engine: str, tmp_path: Path) -> None:
    package = build(built("w8a8"), engine, tmp_path)
    entry = package.manifest.engines[engine].model_copy(update={"target": "sm_1"})
    other = Package(package.folder, package.manifest.model_copy(update={"engines": {engine: entry}}))
    with pytest.raises(SdqError, match="was built for sm_1"):
        Pipeline.from_package(other, engine)
