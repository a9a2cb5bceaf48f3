"""Packages whose size is free: equal to diffusers at several sizes, refused in one sentence outside of the profile."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.lowering.fix_dims import FixDims
from sdq_engines.lowering.graph import load_graph
from sdq_engines.package.schema import ShapeProfile
from sdq_engines.package.store import Package
from sdq_engines.sizes import profile_of_sizes
from sdq_export.engines import check_built_engine
from sdq_export.sampler import compile_sampler, make_scheduler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.writer import ExportResult, export_package
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint
from tests.tiny import write_tiny_sd3

pytestmark = pytest.mark.slow

STEPS, PROMPT = 4, "a red circle"
SIZES = [(64, 64), (96, 64), (64, 128)]  # (height, width)


@pytest.fixture(scope="module")
def free(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """FP32, DPM++ 2M, any size."""
    out = tmp_path_factory.mktemp("free") / "package"
    return export_package(
        source, out, plan_of(source, "dpmpp-2m", STEPS), GUIDANCE, PackageSettings(dtype="fp32", dynamic_size=True)
    )


@pytest.fixture(scope="module")
def package(free: ExportResult) -> Package:
    """Built for all of `SIZES`."""
    made = free.package
    for engine in ("onnxruntime", "openvino"):
        made = build_engine(made, engine, profile_of_sizes(ShapeProfile(batch_max=2), SIZES))
        made, criterion = check_built_engine(made, engine, free)
        assert criterion is not None
    return made


def by_diffusers(source: Source, size: tuple[int, int], **options: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents, and the image rounded to 8 bits, of seed 7."""
    kind = "StableDiffusionImg2ImgPipeline" if "image" in options else "StableDiffusionPipeline"
    shape = {} if "image" in options else {"height": size[0], "width": size[1]}
    pipeline = source.pipeline(make_scheduler("dpmpp-2m", source.scheduler.config), kind)
    latents = pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7),
        output_type="latent", **shape, **options,
    ).images  # fmt: skip
    with torch.no_grad():
        decoded = source.vae.decode(latents / source.vae.config.scaling_factor, return_dict=False)[0]
    return latents.numpy(), np.round(pipeline.image_processor.postprocess(decoded, output_type="np") * 255) / 255


def require_equal(pipeline: Pipeline, wanted: tuple[NDArray[Any], NDArray[Any]], **options: Any) -> None:
    made = pipeline(PROMPT, seed=7, guidance_scale=GUIDANCE, **options)
    image = np.asarray(made.images[0], np.float64) / 255
    assert -10 * np.log10(np.mean((image - wanted[1][0]) ** 2) + 1e-12) >= 50
    assert np.linalg.norm(made.latents - wanted[0]) / np.linalg.norm(wanted[0]) < 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_size_of_the_profile_equals_diffusers(
    source: Source, package: Package, engine: str, size: tuple[int, int]
) -> None:
    pipeline = Pipeline.from_package(package, engine)
    require_equal(pipeline, by_diffusers(source, size), height=size[0], width=size[1])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_image_of_another_size_is_a_start_as_well(source: Source, package: Package, engine: str) -> None:
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((128, 64))
    wanted = by_diffusers(source, (64, 128), image=photo, strength=0.5)
    require_equal(Pipeline.from_package(package, engine), wanted, height=64, width=128, image=photo, strength=0.5)


def test_stable_diffusion_xl_is_told_the_size_that_is_made(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_source(tiny("sdxl"))
    plan = compile_sampler(source.scheduler, STEPS)
    made = export_package(
        source, tmp_path / "package", plan, GUIDANCE, PackageSettings(dtype="fp32", dynamic_size=True)
    )
    package = build_engine(made.package, "onnxruntime", profile_of_sizes(ShapeProfile(), [(96, 64), (64, 64)]))
    wanted = source.pipeline(copy.deepcopy(source.scheduler))(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7),
        height=96, width=64, output_type="latent",
    ).images.numpy()  # fmt: skip
    pipeline = Pipeline.from_package(package, "onnxruntime")
    sizes = {"height": 96, "width": 64, "seed": 7, "guidance_scale": GUIDANCE}
    found = pipeline(PROMPT, **sizes).latents
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4
    told_another = pipeline(PROMPT, original_size=(64, 64), target_size=(64, 64), **sizes).latents
    assert np.linalg.norm(told_another - wanted) / np.linalg.norm(wanted) > 1e-4


@pytest.fixture(scope="module")
def free_sd3(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Package]:
    """Stable Diffusion 3, FP32, its position table for latents of up to 48x48; built for 32x32 to 96x64 pixels."""
    source = load_source(tiny("sd3"))
    made = export_package(
        source,
        tmp_path_factory.mktemp("free") / "sd3",
        compile_sampler(source.scheduler, STEPS),
        GUIDANCE,
        PackageSettings(dtype="fp32", dynamic_size=True),
    )
    package = made.package
    for engine in ("onnxruntime", "openvino"):
        package = build_engine(package, engine, profile_of_sizes(ShapeProfile(), [(64, 64), (48, 80), (80, 48)]))
        package, criterion = check_built_engine(package, engine, made)
        assert criterion is not None
    return source, package


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 64)])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_stable_diffusion_3_crops_its_positions_for_every_size(
    free_sd3: tuple[Source, Package], engine: str, size: tuple[int, int]
) -> None:
    """Odd and even numbers of rows and columns of the table on either side."""
    source, package = free_sd3
    pipeline = source.pipeline(copy.deepcopy(source.scheduler))
    latents = pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7),
        height=size[0], width=size[1], output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        scaled = latents / source.vae.config.scaling_factor + source.vae.config.shift_factor
        decoded = source.vae.decode(scaled, return_dict=False)[0]
    wanted = np.round(pipeline.image_processor.postprocess(decoded, output_type="np") * 255) / 255
    require_equal(Pipeline.from_package(package, engine), (latents.numpy(), wanted), height=size[0], width=size[1])


def test_an_image_larger_than_the_position_table_is_one_sentence(free_sd3: tuple[Source, Package]) -> None:
    _, package = free_sd3
    assert (package.manifest.io.size_multiple, package.manifest.io.size_limit) == (16, 384)
    with pytest.raises(SdqError, match=r"64x400 is too large .* at most 384") as refused:
        Pipeline.from_package(package, "onnxruntime")(PROMPT, height=400)
    assert "64x384" in refused.value.hint
    with pytest.raises(SdqError, match="at most 384"):
        build_engine(package, "onnxruntime", profile_of_sizes(ShapeProfile(), [(64, 64), (400, 64)]))
    other = {name for name in package.manifest.fidelity["parity"] if name.endswith("_other_size")}
    assert other == {"float_graph_other_size", "vae_decoder_other_size", "vae_encoder_other_size"}


def test_a_model_whose_own_size_is_the_largest_is_compared_at_a_smaller_one(tmp_path: Path) -> None:
    folder = write_tiny_sd3(tmp_path / "model")
    (folder / "transformer" / "config.json").write_text(
        json.dumps({**json.loads((folder / "transformer" / "config.json").read_text()), "pos_embed_max_size": 4})
    )
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    table = PatchEmbed(8, 8, 2, 16, 32, pos_embed_max_size=4).pos_embed
    save_file({**weights, "pos_embed.pos_embed": table}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    source = load_source(folder)
    made = export_package(
        source,
        tmp_path / "package",
        compile_sampler(source.scheduler, 2),
        7.0,
        PackageSettings(dtype="fp32", dynamic_size=True),
    )
    assert made.package.manifest.io.size_limit == 64
    (found,) = (each for each in made.report.criteria if each.name == "float_graph_other_size")
    assert found.passed
    assert "6x4 latents" in found.says


def test_a_quantized_stable_diffusion_3_of_free_size_builds(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """For a range of sizes up to the largest, and for one, with all layers in integers."""
    source = load_source(tiny("sd3"))
    plan = compile_sampler(source.scheduler, 3)
    checkpoint = quantized_checkpoint(source, plan, "w4a8", keep=("pos_embed.proj", "proj_out"))
    result = export_package(
        source, tmp_path / "package", plan, 7.0, PackageSettings(dynamic_size=True), checkpoint=checkpoint
    )
    package = result.package
    for sizes in ([(64, 64), (32, 32), (384, 384)], []):
        for engine in ("openvino", "tensorrt-rtx"):
            package = build_engine(package, engine, profile_of_sizes(ShapeProfile(), sizes))
            package, _ = check_built_engine(package, engine, result)
            kernels = package.manifest.engines[engine].kernels
            assert kernels is not None
            assert (kernels.quantized_layers, kernels.int8, kernels.fallback) == (33, 33, [])


def test_one_pipeline_goes_from_size_to_size(package: Package) -> None:
    """State, prompts and buffers of one call do not reach the next."""
    pipeline = Pipeline.from_package(package, "openvino")
    first = pipeline(PROMPT, seed=7).latents
    assert first.shape == (1, 4, 8, 8)
    assert pipeline(PROMPT, seed=7, height=96, num_images_per_prompt=2).latents.shape == (2, 4, 12, 8)
    assert np.array_equal(pipeline(PROMPT, seed=7).latents, first)


def test_the_manifest_and_parity_say_so(package: Package) -> None:
    content = json.loads((package.folder / "manifest.json").read_text(encoding="utf-8"))
    assert content["io"]["size_multiple"] == 32
    assert content["io"]["image_size"] == [64, 64]
    profile = content["engines"]["openvino"]["profile"]
    assert (profile["size_min"], profile["size_opt"], profile["size_max"]) == ([64, 64], [64, 64], [96, 128])
    other = {name for name in content["fidelity"]["parity"] if name.endswith("_other_size")}
    assert other == {"float_graph_other_size", "vae_decoder_other_size", "vae_encoder_other_size"}


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ({"height": 160}, "openvino engine was built for images of 64x64 to 128x96; 64x160 was asked for",
         "--engine openvino --size 64x64 --size 128x96 --size 64x160"),
        ({"width": 32}, "built for images of 64x64 to 128x96; 32x64", "--size 32x64"),
        ({"height": 70}, "64x70 is no size of this package: width and height are multiples of 32", "64x64"),
    ],
)  # fmt: skip
def test_a_size_outside_the_profile_is_one_sentence(
    package: Package, asked: dict[str, int], message: str, hint: str
) -> None:
    with pytest.raises(SdqError, match=message) as refused:
        Pipeline.from_package(package, "openvino")(PROMPT, **asked)  # type: ignore[arg-type]
    assert hint in refused.value.hint


def test_a_package_of_one_size_says_how_to_get_others(float_package: ExportResult) -> None:
    with pytest.raises(SdqError, match="images of 64x64 only; 96x64 was asked for") as refused:
        build_engine(float_package.package, "openvino", profile_of_sizes(ShapeProfile(), [(64, 96)]))
    assert "--dynamic-size" in refused.value.hint
    made = build_engine(float_package.package, "onnxruntime")
    pipeline = Pipeline.from_package(made, "onnxruntime")
    with pytest.raises(SdqError, match="cannot honour width=96") as refused:
        pipeline(PROMPT, width=96)
    assert "--dynamic-size" in refused.value.hint
    assert pipeline(PROMPT, seed=1, height=64, width=64).images[0].size == (64, 64)


def test_a_size_is_written_into_the_graph_for_an_engine_of_one_size(package: Package) -> None:
    for component in ("denoiser", "vae_decoder", "vae_encoder"):
        graph = load_graph(package.component(component))
        FixDims({"height": 8, "width": 16, "image_height": 64, "image_width": 128})(graph)
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            if value.shape is not None and len(value.shape) >= 4:
                assert value.shape[-2:] in ((8, 16), (64, 128)), value
    wrong = ShapeProfile(size_min=(96, 64), size_opt=(64, 64), size_max=(96, 64))
    with pytest.raises(SdqError, match="in order"):
        build_engine(package, "onnxruntime", wrong)


def test_a_quantized_denoiser_of_free_size_keeps_its_integer_kernels(source: Source, tmp_path: Any) -> None:
    """Built for a range of sizes and for one size, by OpenVINO and by TensorRT-RTX's builder."""
    plan = plan_of(source, "ddim", 3)
    checkpoint = quantized_checkpoint(source, plan, "w4a8")
    result = export_package(
        source, tmp_path / "package", plan, GUIDANCE, PackageSettings(dynamic_size=True), checkpoint=checkpoint
    )
    package = result.package
    layers = len(checkpoint.spec.weights)
    for sizes in (SIZES, []):
        for engine in ("openvino", "tensorrt-rtx"):
            package = build_engine(package, engine, profile_of_sizes(ShapeProfile(), sizes))
            package, _ = check_built_engine(package, engine, result)
            kernels = package.manifest.engines[engine].kernels
            assert kernels is not None
            assert kernels.quantized_layers == layers
            assert kernels.int8 >= 0.95 * layers, kernels.fallback
