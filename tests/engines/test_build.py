"""Engines are built in a child process: what they compiled is counted, and a failure leaves the package as it was."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from sdq_engines import Pipeline
from sdq_engines.build import build_engine, choose_engine
from sdq_engines.errors import SdqError
from sdq_engines.files import sha256_file
from sdq_engines.package.editor import PackageEditor
from sdq_engines.package.layout import DENOISER, model_file
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package, open_package
from tests.engines.conftest import SHAPES
from tests.engines.graphs import ATTENTION, Graph, TinyShape, denoiser, value
from tests.engines.packages import make_package

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
LINEAR = {f"{ATTENTION}.attn1.to_{kind}" for kind in "qkv"} | {f"{ATTENTION}.attn2.to_q"}


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def replace_denoiser(package: Package, model: onnx.ModelProto) -> Package:
    with PackageEditor.edit(package.folder, "test") as editor:
        editor.add_bytes(model_file(DENOISER), model.SerializeToString())
        return editor.commit(editor.current)


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
def test_openvino_runs_every_quantized_layer_on_integer_kernels(
    built: Callable[[str], Package], precision: str
) -> None:
    kernels = built(precision).manifest.engines["openvino"].kernels
    assert kernels is not None
    assert kernels.quantized_layers == 6
    assert kernels.fallback == []
    assert (kernels.int8, kernels.int4) == ((2, 4) if precision == "w4a16" else (6, 0))


def test_onnxruntime_is_a_reference_and_says_so(built: Callable[[str], Package]) -> None:
    entry = built("w4a8").manifest.engines["onnxruntime"]
    assert entry.kernels is not None
    assert (entry.kernels.int8, entry.kernels.int4) == (0, 0)
    assert len(entry.kernels.fallback) == entry.kernels.quantized_layers == 6
    assert entry.bytes_on_disk == 0


def test_an_entry_says_what_was_built(built: Callable[[str], Package]) -> None:
    package = built("w4a8")
    entry = package.manifest.engines["openvino"]
    assert entry.build_seconds > 0
    assert 20e6 < entry.peak_memory_bytes < 20e9
    assert entry.bytes_on_disk == sum(package.path(file).stat().st_size for file in entry.components.values())
    assert entry.profile == ShapeProfile(batch_min=1, batch_opt=1, batch_max=4)
    open_package(package.folder)


@needs_rtx
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
def test_tensorrt_rtx_builds_without_a_gpu_and_keeps_integer_kernels(tmp_path: Path, precision: str) -> None:
    heard: list[tuple[str, str]] = []
    package = make_package(tmp_path / "package", SHAPES[precision])
    package = build_engine(package, "tensorrt-rtx", on_progress=lambda *event: heard.append(event))
    entry = package.manifest.engines["tensorrt-rtx"]
    assert entry.kernels is not None
    assert entry.kernels.fallback == []
    assert (entry.kernels.int8, entry.kernels.int4) == ((2, 4) if precision == "w4a16" else (6, 0))
    assert "sm_89" in entry.target
    assert "sm_75" not in entry.target
    assert ("denoiser", "building") in heard
    open_package(package.folder)


@needs_rtx
def test_a_layer_that_falls_back_is_named(tmp_path: Path) -> None:
    """A per-channel activation scale is what TensorRT has no INT8 convolution for."""
    model = denoiser(TinyShape())
    for constant in model.graph.initializer:
        if constant.name in ("mid_block.resnets.0.conv2/scale", "mid_block.resnets.0.conv2/zero"):
            array = onnx.numpy_helper.to_array(constant)
            constant.CopyFrom(onnx.numpy_helper.from_array(np.repeat(array, 32), constant.name))
    package = replace_denoiser(make_package(tmp_path / "package", TinyShape()), model)
    kernels = build_engine(package, "tensorrt-rtx").manifest.engines["tensorrt-rtx"].kernels
    assert kernels is not None
    assert kernels.fallback == ["mid_block.resnets.0.conv2"]
    assert kernels.int8 == 5


def test_building_again_replaces_the_engine_and_leaves_no_file_behind(copy: Package) -> None:
    before = contents(copy.folder)
    after = build_engine(copy, "openvino", ShapeProfile(batch_max=2))
    files = contents(copy.folder)
    assert len(files) == len(before)
    assert set(files) - {"manifest.json"} == set(after.manifest.files)
    assert after.manifest.engines["openvino"].profile.batch_max == 2
    assert after.manifest.engines["onnxruntime"] == copy.manifest.engines["onnxruntime"]
    open_package(copy.folder)


def test_a_profile_of_one_batch_size_is_static_and_holds_to_it(copy: Package) -> None:
    fixed = build_engine(copy, "openvino", ShapeProfile(batch_min=2, batch_opt=2, batch_max=2))
    pipeline = Pipeline.from_package(fixed, "openvino")
    reference = Pipeline.from_package(fixed, "onnxruntime")
    pair = pipeline("a red star", seed=1, num_images_per_prompt=2).latents
    wanted = reference("a red star", seed=1, num_images_per_prompt=2).latents
    assert np.linalg.norm(pair - wanted) / np.linalg.norm(wanted) < 2e-2
    with pytest.raises(SdqError, match=r"was built for latents of shape \[2,4,8,8\]"):
        pipeline("a red star", seed=1)


@needs_rtx
def test_a_crash_of_the_builder_is_one_sentence_and_the_package_is_as_it_was(copy: Package) -> None:
    """A convolution whose activation scale is gathered by step: TensorRT-RTX 1.7.1 dies of it."""
    package = replace_denoiser(copy, gathered_scale())
    before = contents(package.folder)
    with pytest.raises(SdqError) as caught:
        build_engine(package, "tensorrt-rtx")
    assert "tensorrt-rtx" in caught.value.message
    assert "denoiser" in caught.value.message
    assert "log ended with" in caught.value.hint
    assert "Traceback" not in str(caught.value)
    assert contents(package.folder) == before


def gathered_scale() -> onnx.ModelProto:
    """The tiny denoiser with one convolution's scale taken from a table at run time."""
    model = denoiser(TinyShape(groups=1))
    site = "mid_block.resnets.0.conv1"
    table = onnx.numpy_helper.from_array(np.linspace(0.02, 0.08, 4, dtype=np.float32), f"{site}/table")
    model.graph.initializer.append(table)
    gather = onnx.helper.make_node("Gather", [table.name, "step"], [f"{site}/s_t"], name=f"{site}/s_t")
    index = next(i for i, node in enumerate(model.graph.node) if node.name == f"{site}/quantize")
    model.graph.node.insert(index, gather)
    for node in model.graph.node:
        if node.name in (f"{site}/quantize", f"{site}/dequantize"):
            node.input[1] = f"{site}/s_t"
    return model


def test_a_refusal_is_one_sentence_and_the_package_is_as_it_was(copy: Package) -> None:
    graph = Graph(0)
    graph.nodes.append(onnx.helper.make_node("NotAnOperator", ["latents"], ["latents_out"], domain="nowhere"))
    shape = ["batch", 4, 8, 8]
    made = onnx.helper.make_graph(graph.nodes, "x", [value("latents", 1, shape)], [value("latents_out", 1, shape)])
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nowhere", 1)]
    package = replace_denoiser(copy, onnx.helper.make_model(made, opset_imports=domains, ir_version=10))
    before = contents(package.folder)
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(SdqError) as caught:
            build_engine(package, engine)
        assert "denoiser" in caught.value.message
        assert "NotAnOperator" in caught.value.message
        assert "Traceback" not in str(caught.value)
        assert contents(package.folder) == before


def test_ctrl_c_ends_the_builder_and_leaves_the_package_as_it_was(bare: Package) -> None:
    before = contents(bare.folder)

    def interrupt(component: str, stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(bare, "openvino", on_progress=interrupt)
    assert contents(bare.folder) == before
    assert not list(bare.folder.rglob(".building-*"))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_builder_is_said_to_lack_memory(bare: Package) -> None:
    """As the system's out-of-memory killer does it."""
    before = contents(bare.folder)

    def kill(component: str, stage: str) -> None:
        children = psutil.Process().children()
        (builder,) = [child for child in children if "sdq_engines.build_child" in child.cmdline()]
        builder.kill()

    with pytest.raises(SdqError) as caught:
        build_engine(bare, "openvino", on_progress=kill)
    said = r"builder of openvino was killed, probably for want of memory \(0\.\d GB were in use\) while lowering \w+;"
    assert re.search(said, caught.value.message), caught.value.message
    assert "more free memory" in caught.value.hint
    assert contents(bare.folder) == before


def test_requests_that_cannot_be_built(bare: Package) -> None:
    with pytest.raises(SdqError, match="no engine 'tensorflow'"):
        build_engine(bare, "tensorflow")
    with pytest.raises(SdqError, match="not in order"):
        build_engine(bare, "openvino", ShapeProfile(batch_min=3, batch_opt=2))
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(SdqError, match="tensorrt is not installed") as caught:
            build_engine(bare, "tensorrt")
        assert "sdq-deploy[tensorrt]" in caught.value.hint
    assert choose_engine("auto") in ("tensorrt", "tensorrt-rtx", "openvino")


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_package_is_one_sentence(bare: Package) -> None:
    bare.folder.chmod(0o555)
    try:
        with pytest.raises(SdqError, match="cannot be written"):
            build_engine(bare, "onnxruntime")
    finally:
        bare.folder.chmod(0o755)
