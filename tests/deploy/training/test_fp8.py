"""FP8 goes the whole road: fake quantizer, training, export and its gate, engines that run, refuse or are built."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sdq_deploy.recipes import load_recipe
from sdq_deploy.training.lsq import fake_quantize_lsq
from sdq_deploy.training.methods.registry import method_named
from sdq_engines import Pipeline
from sdq_engines.build import build_engine, choose_engine
from sdq_engines.errors import SdqError
from sdq_engines.formats import FP8
from sdq_engines.package.layout import DENOISER
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import open_package
from sdq_export.checkpoint import QuantizedCheckpoint, load_checkpoint, weight_key
from sdq_export.engines import check_built_engine
from sdq_export.rounding import fake_quantize
from sdq_export.settings import PackageSettings
from sdq_export.sites import find_sites
from sdq_export.source import load_source
from sdq_export.writer import ExportResult, export_package
from tests.deploy.training.helpers import small_context
from tests.deploy.training.methods.runs import run_method, snr_of
from tests.tiny import tiny_unet

FP8_RUN = {"quantization.precision": "fp8", "fit.max_train_steps": 3}


@pytest.fixture(scope="module")
def run(tiny_sd: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "run"
    run_method(tiny_sd, finished_run, out, FP8_RUN)
    return out


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> QuantizedCheckpoint:
    return load_checkpoint(run)


@pytest.fixture(scope="module")
def exported(tiny_sd: Path, run: Path, checkpoint: QuantizedCheckpoint) -> ExportResult:
    plan = small_context(tiny_sd, run).plan
    out = run.parent / "package"
    return export_package(
        load_source(tiny_sd), out, plan, 4.0, PackageSettings(vae_encoder=False), checkpoint=checkpoint
    )


def test_gradients_are_straight_through_and_of_the_rounding_error() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 300) * 3).requires_grad_()
    scale = torch.full((4, 1), 1 / 128, requires_grad=True)
    out = fake_quantize_lsq(x, scale, FP8, 0.5)
    assert torch.equal(out, fake_quantize(x.detach(), scale.detach(), FP8))
    grad = torch.randn(4, 300)
    out.backward(grad)
    v = (x / scale).detach()
    inside = v.abs() < 448
    assert inside.any()
    assert not inside.all()
    assert torch.equal(x.grad, grad * inside)
    slope = torch.where(inside, (out / scale - v).detach(), v.clamp(-448, 448))
    torch.testing.assert_close(scale.grad, (grad * slope).sum(1, keepdim=True) * 0.5, rtol=1e-4, atol=1e-3)


def test_training_ends_as_a_checkpoint_of_fp8(tiny_sd: Path, run: Path, checkpoint: QuantizedCheckpoint) -> None:
    spec = checkpoint.spec
    assert spec.precision == "fp8"
    assert {site.format for site in spec.weights} == {FP8}
    assert {site.format for site in spec.activations} == {FP8.per_tensor()}
    assert {site.num_groups for site in spec.activations} == {3}
    assert {checkpoint.tensors[weight_key(site.layer)].dtype for site in spec.weights} == {torch.float8_e4m3fn}
    trajectory = checkpoint.info.notes["trajectory_snr_db"]
    assert trajectory["best"] >= trajectory["start"] > 20
    assert snr_of(tiny_sd, run, checkpoint) == pytest.approx(trajectory["best"], abs=1e-3)


def test_ptq_finds_fp8_scales(tiny_sd: Path, finished_run: Path, tmp_path: Path) -> None:
    found = run_method(tiny_sd, finished_run, tmp_path / "run", FP8_RUN | {"method": "ptq", "ptq.algorithm": "max"})
    assert found.info.notes["trajectory_snr_db"]["best"] > 20


def test_what_fp8_has_no_place_for_is_refused() -> None:
    with pytest.raises(SdqError, match=r"fp8 has no weights of 4 bits, which quantization.bits asks for by 'mid_"):
        find_sites(tiny_unet(), 3, "fp8", bits={"mid_block.*": 4})
    recipe = load_recipe("shapes-64", FP8_RUN | {"method": "ptq-reconstruction"})
    with pytest.raises(SdqError, match="rounded down or up, and fp8 has weights in FP8 E4M3"):
        method_named(recipe.method).check(recipe, 1)


def test_the_graph_is_q_dq_to_fp8_in_the_per_step_form(exported: ExportResult) -> None:
    criteria = {criterion.name: criterion for criterion in exported.report.criteria}
    assert criteria["site_integers"].worst == 0
    assert criteria["site_outputs"].worst < 2e-6
    assert all(criterion.passed for criterion in criteria.values())
    graph = onnx.load(exported.package.component(DENOISER)).graph
    kinds = {value.name: value.data_type for value in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    weights = [node for node in graph.node if node.name.endswith("/weight_dequantize")]
    assert len(weights) == criteria["site_outputs"].details["layers"]
    assert len(quantize) == criteria["site_integers"].details["sites"]
    assert {kinds[node.input[2]] for node in quantize} == {onnx.TensorProto.FLOAT8E4M3FN}
    assert {kinds[node.input[0]] for node in weights} == {onnx.TensorProto.FLOAT8E4M3FN}
    assert {maker[node.input[0]].name.rpartition("/")[2] for node in quantize} == {"rescale_in"}


def test_onnxruntime_runs_it(exported: ExportResult) -> None:
    package = build_engine(open_package(exported.package.folder), "onnxruntime")
    package, criterion = check_built_engine(package, "onnxruntime", exported)
    assert criterion is not None
    assert criterion.passed
    image = Pipeline.load(package.folder, engine="onnxruntime")("a red circle", seed=7).images[0]
    assert np.asarray(image).std() > 0


def test_openvino_refuses_it_and_auto_passes_it_by(exported: ExportResult) -> None:
    with pytest.raises(SdqError, match="openvino cannot be built for a package of precision fp8"):
        build_engine(exported.package, "openvino")
    assert choose_engine("auto", "fp8") != "openvino"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_tensorrt_rtx_builds_for_named_targets_that_have_fp8(exported: ExportResult) -> None:
    package, one = open_package(exported.package.folder), ShapeProfile(batch_max=1)
    with pytest.raises(SdqError, match="for sm_86: FP8 E4M3 needs sm_89 or newer"):
        build_engine(package, "tensorrt-rtx", one, {"sm": [86]})
    with pytest.raises(SdqError, match="cannot build for sm_90"):
        build_engine(package, "tensorrt-rtx", one, {"sm": [90]})
    entry = build_engine(package, "tensorrt-rtx", one, {"sm": [120, 89]}).engine("tensorrt-rtx")
    assert entry.target == "any of sm_89, sm_120"
    assert entry.kernels is not None
    assert entry.kernels.fallback == []
    assert entry.kernels.fp8 == entry.kernels.quantized_layers > 90
