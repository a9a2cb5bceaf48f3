"""Whole packages: equal to diffusers, faithful when quantized, written whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sdq_engines import Pipeline
from sdq_engines.backends.onnxruntime import open_session
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.store import open_package
from sdq_export.checkpoint import QuantizedCheckpoint
from sdq_export.engines import check_built_engine
from sdq_export.parity.distances import compare_distances
from sdq_export.parity.report import Criterion, ParityReport
from sdq_export.source import Source
from sdq_export.writer import ExportResult, export_package
from tests.engines.graphs import COMPONENTS
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint
from tests.images import psnr

PROMPTS = ["a red circle", "two blue stars on a white background"]
SEEDS = [3, 4]


def diffusers_images(source: Source, scheduler: Any, steps: int) -> NDArray[np.float32]:
    """What diffusers' own pipeline makes, float32 [2, h, w, 3] in [0, 1]."""
    images: NDArray[np.float32] = source.pipeline(scheduler)(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    return images


def test_an_fp32_package_makes_diffusers_images(source: Source, float_package: ExportResult) -> None:
    from sdq_export.sampler import make_scheduler

    package = build_engine(float_package.package, "onnxruntime")
    result = Pipeline.load(package.folder, engine="onnxruntime")(PROMPTS, seed=SEEDS, guidance_scale=GUIDANCE)
    found = np.stack([np.asarray(image, np.float32) / 255 for image in result.images])
    plan = float_package.plan
    wanted = diffusers_images(source, make_scheduler("pndm", source.scheduler.config), plan.num_inference_steps)
    assert psnr(found, np.round(wanted * 255) / 255) >= 50


def test_parity_is_reported_per_step(quantized_package: ExportResult) -> None:
    manifest = json.loads((quantized_package.package.folder / "manifest.json").read_text())
    parity = manifest["fidelity"]["parity"]
    assert set(parity) == {
        "float_graph", "site_integers", "site_outputs", "quantized_graph", "text_encoder", "vae_decoder",
        "vae_encoder",
    }  # fmt: skip
    assert len(parity["quantized_graph"]["per_step"]) == quantized_package.plan.calls
    assert len(parity["float_graph"]["per_step"]) == quantized_package.plan.calls
    assert all(figures["worst"] <= figures["limit"] for figures in parity.values())
    assert quantized_package.report.passed


def test_the_package_is_whole_and_says_what_it_is(source: Source, quantized_package: ExportResult) -> None:
    package = open_package(quantized_package.package.folder, verify="full")
    manifest = package.manifest
    assert (manifest.precision, manifest.family) == ("w4a8", "stable-diffusion")
    assert manifest.io.latent_shape == (4, 8, 8)
    assert manifest.io.image_size == (64, 64)
    assert manifest.sampler.scheduler == "DPMSolverMultistepScheduler"
    assert manifest.sampler.history == 1
    assert manifest.source.sha256 == source.sha256
    assert "w4a8" in manifest.source.changes
    assert {"NOTICE", "sampler.safetensors", "tokenizer/tokenizer.json"} <= set(manifest.files)
    on_disk = {file.relative_to(package.folder).as_posix() for file in package.folder.rglob("*") if file.is_file()}
    assert on_disk - {"manifest.json"} == set(manifest.files)
    for component in COMPONENTS:
        onnx.checker.check_model(str(package.component(component)), full_check=True)
    arrays = load_file(package.path("sampler.safetensors"))
    assert arrays["coefficients"].shape == (6, 6, 2 * 2 + 3 * 2)


def test_weights_are_stored_in_fp16_and_int4(quantized_package: ExportResult) -> None:
    package = quantized_package.package
    for component in COMPONENTS:
        stored = onnx.load(package.component(component)).graph.initializer
        large = {tensor.data_type for tensor in stored if np.prod(tensor.dims) > 2000}
        floats = {onnx.TensorProto.FLOAT16} if component != "denoiser" else {onnx.TensorProto.INT4}
        assert large == floats, component


def test_a_quantized_package_runs_and_its_engine_keeps_parity(quantized_package: ExportResult) -> None:
    package = build_engine(quantized_package.package, "onnxruntime")
    package, criterion = check_built_engine(package, "onnxruntime", quantized_package)
    assert criterion is not None
    assert criterion.passed
    assert "engine:onnxruntime" in open_package(package.folder).manifest.fidelity["parity"]
    images = Pipeline.load(package.folder, engine="onnxruntime")("a red circle", seed=1).images
    assert images[0].size == (64, 64)


def test_an_engine_that_strays_is_taken_out(quantized_package: ExportResult, monkeypatch: pytest.MonkeyPatch) -> None:
    package = build_engine(quantized_package.package, "onnxruntime")
    monkeypatch.setattr("sdq_export.parity.engine.ENGINE_LIMIT", 0.5)
    with pytest.raises(SdqError, match="engine onnxruntime was taken out"):
        check_built_engine(package, "onnxruntime", quantized_package)
    assert "onnxruntime" not in open_package(package.folder).manifest.engines


def test_a_damaged_scale_fails_parity_and_nothing_is_written(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that quantizes with other scales than the checkpoint's is caught by the layers alone."""
    from sdq_export.passes.timestep_scales import TimestepScales

    plan = plan_of(source, "ddim", 3)
    checkpoint = quantized_checkpoint(source, plan, "w8a8")
    original = TimestepScales.__init__

    def wrong(self: TimestepScales, sites: Any, tensors: Any) -> None:
        original(self, sites, {name: value * 1.01 for name, value in tensors.items()})

    monkeypatch.setattr(TimestepScales, "__init__", wrong)
    with pytest.raises(SdqError, match="nothing was written"):
        export_package(source, tmp_path / "package", plan, GUIDANCE, checkpoint=checkpoint)
    assert not (tmp_path / "package").exists()


def test_a_folder_that_is_not_ours_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SdqError, match=r"was not made by sdq-deploy"):
        export_package(source, tmp_path, plan_of(source, "ddim", 2), GUIDANCE)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_source_or_step_count_is_refused(source: Source, tmp_path: Path) -> None:
    plan = plan_of(source, "ddim", 3)
    checkpoint = quantized_checkpoint(source, plan, "w8a8")
    with pytest.raises(SdqError, match="3 model calls, this sampler makes 4"):
        export_package(source, tmp_path / "p", plan_of(source, "ddim", 4), GUIDANCE, checkpoint=checkpoint)
    other = checkpoint.info.source.model_copy(update={"sha256": "0" * 64})
    foreign = QuantizedCheckpoint(checkpoint.info.model_copy(update={"source": other}), checkpoint.tensors)
    with pytest.raises(SdqError, match=r"was not trained from .* as it is"):
        export_package(source, tmp_path / "p", plan, GUIDANCE, checkpoint=foreign)
    assert not (tmp_path / "p").exists()


def test_exporting_again_replaces_the_package(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "package"
    first = export_package(source, out, plan_of(source, "ddim", 2), GUIDANCE).package
    build_engine(first, "openvino")
    second = export_package(source, out, plan_of(source, "ddim", 3), GUIDANCE).package
    assert second.manifest.sampler.num_calls == 3
    assert second.manifest.engines == {}
    assert not (out / "engines").exists()
    open_package(out, verify="full")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_write_that_fails_leaves_the_package_that_was_there(source: Source, tmp_path: Path) -> None:
    """From the VAE decoder on, files may have 10 kB: a disk that is full halfway."""
    import resource

    out = tmp_path / "package"
    export_package(source, out, plan_of(source, "ddim", 2), GUIDANCE)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(stage: str, *_: int) -> None:
        if stage == "capturing the VAE decoder":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))

    for folder in (out, tmp_path / "new"):
        try:
            with pytest.raises(OSError, match="File too large"):
                export_package(source, folder, plan_of(source, "ddim", 3), GUIDANCE, on_stage=fill_the_disk)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_step_is_forgiven_chance_and_the_whole_is_not() -> None:
    generator = np.random.default_rng(0)
    wanted = 0.04 * generator.uniform(0.8, 1.2, (20, 8))
    noisy = compare_distances("x", "x", 1.05, range(20), wanted * generator.uniform(0.9, 1.1, wanted.shape), wanted)
    assert noisy.passed
    worse = compare_distances("x", "x", 1.05, range(20), wanted * 1.07, wanted)
    assert worse.failing is None
    assert not worse.passed
    with pytest.raises(SdqError, match="over all steps: x is 1"):
        ParityReport(criteria=(worse,)).require()
    one_bad = wanted.copy()
    one_bad[7] *= 1.3
    assert compare_distances("x", "x", 1.05, range(20), one_bad, wanted).failing == 7


def test_not_a_number_does_not_pass() -> None:
    criterion = Criterion(name="x", says="x", limit=1.0, steps=(0, 1), per_step=(0.5, float("nan")))
    assert not criterion.passed
    with pytest.raises(SdqError):
        ParityReport(criteria=(criterion,)).require()


def test_text_encoder_takes_any_batch(source: Source, float_package: ExportResult) -> None:
    session = open_session(float_package.package.component("text_encoder"), threads=1)
    for count in (1, 3):
        ids = np.full((count, 16), source.part("tokenizer").pad_token_id, np.int64)
        assert session.run(None, {"input_ids": ids})[0].shape == (count, 16, 32)
