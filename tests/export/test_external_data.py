"""A graph too large for one protobuf file keeps its weights beside it; here a low limit makes every graph so."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from sdq_engines import Pipeline
from sdq_engines.backends.base import BuildJob
from sdq_engines.backends.registry import backend
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.lowering import save
from sdq_engines.package.layout import DENOISER
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, open_package
from sdq_export.source import Source
from sdq_export.writer import export_package
from tests.engines.graphs import COMPONENTS
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint
from tests.nearness import relative


@pytest.fixture(scope="module")
def packages(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, Package]:
    """The same W4A8 package with its weights beside the graphs and inside of them, each with both CPU engines."""
    plan = plan_of(source, "ddim", 3)
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    folder, made = tmp_path_factory.mktemp("external"), []
    for name, limit in (("beside", 1000), ("inside", 1 << 30)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(save, "_INLINE_BYTES", limit)
            package = export_package(source, folder / name, plan, GUIDANCE, checkpoint=checkpoint).package
        for engine in ("onnxruntime", "openvino"):
            package = build_engine(package, engine)
        made.append(package)
    return made[0], made[1]


def test_weights_are_beside_the_graph_listed_and_hashed(packages: tuple[Package, Package]) -> None:
    beside, inside = packages
    for component in COMPONENTS:
        graph, weights = f"{component}/model.onnx", f"{component}/model.onnx.data"
        sizes = {name: beside.manifest.files[name].size for name in (graph, weights)}
        assert weights not in inside.manifest.files
        assert sizes[graph] + sizes[weights] >= inside.manifest.files[graph].size * 0.95
        loaded = onnx.load(beside.component(component), load_external_data=False)
        stored = [tensor for tensor in loaded.graph.initializer if onnx.external_data_helper.uses_external_data(tensor)]
        assert {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"} == {
            "model.onnx.data"
        }
    open_package(beside.folder, verify="full")


def test_a_flipped_byte_of_the_weights_is_named(packages: tuple[Package, Package]) -> None:
    weights = packages[0].path("denoiser/model.onnx.data")
    sound = weights.read_bytes()
    weights.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    try:
        with pytest.raises(SdqError, match=r"denoiser/model\.onnx\.data .* is damaged"):
            open_package(packages[0].folder, verify="full")
    finally:
        weights.write_bytes(sound)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_compute_the_same_as_with_the_weights_inside(packages: tuple[Package, Package], engine: str) -> None:
    beside, inside = (
        Pipeline.load(package.folder, engine=engine)("a red circle", seed=3).latents for package in packages
    )
    assert relative(beside, inside) < 2e-2  # two executables of one quantized network


def test_a_lowered_graph_too(
    packages: tuple[Package, Package], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the builder's process writes between the lowering and the compiler."""
    monkeypatch.setattr(save, "_INLINE_BYTES", 1000)
    made = backend("openvino").build(BuildJob(packages[0], tmp_path, ShapeProfile()))
    assert (tmp_path / "work" / DENOISER / "model.onnx.data").stat().st_size > 1000
    assert made.kernels == packages[1].manifest.engines["openvino"].kernels
