"""Stable Diffusion 3: the step denoiser, the prologue's rows and whole packages against diffusers' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import CheckerPass
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdq_deploy.random_checkpoints import randomize_
from sdq_engines import Pipeline
from sdq_engines.backends.registry import backend
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.formats import INT8
from sdq_engines.package.layout import DENOISER, PROLOGUE
from sdq_export import integer_storage
from sdq_export.conditioning import Conditioning
from sdq_export.denoiser import build_denoiser, run_passes
from sdq_export.engines import check_built_engine
from sdq_export.families.sd3 import StableDiffusion3, StableDiffusion3WithT5
from sdq_export.parity.graphs import GraphRunner, open_graph
from sdq_export.passes.modulation import CONTEXT
from sdq_export.sampler import SamplerPlan, compile_sampler
from sdq_export.settings import PackageSettings
from sdq_export.sites import find_sites
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import ExportResult, export_package
from tests.export.quantized import quantized_checkpoint
from tests.images import psnr
from tests.nearness import FLOAT_NOISE, relative
from tests.tiny import write_tiny_sd3

pytestmark = pytest.mark.slow

KEEP = ("pos_embed.proj", "proj_out")
PROMPTS = ["a red circle", "two boats at sea"]
STEPS = 4


@pytest.fixture(scope="module")
def source(tiny: Callable[[str], Path]) -> Source:
    return load_source(tiny("sd3"))


@pytest.fixture(scope="module")
def source_t5(tiny: Callable[[str], Path]) -> Source:
    return load_source(tiny("sd3-t5"))


@pytest.fixture(scope="module")
def source_medium(tiny: Callable[[str], Path]) -> Source:
    return load_source(tiny("sd3.5-medium"))


@pytest.fixture(scope="module")
def plan(source: Source) -> SamplerPlan:
    return compile_sampler(source.scheduler, STEPS)


@pytest.fixture(scope="module")
def captured_once(source: Source) -> ir.Model:
    return source.family.capture_denoiser(source.denoiser, source.family.latent_shape(source), 16)


@pytest.fixture
def captured(captured_once: ir.Model) -> ir.Model:
    return captured_once.clone()


def inputs(source: Source, batch: int = 2) -> tuple[Tensor, Conditioning]:
    latents = torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, source.family.encode_prompts(source, PROMPTS[:batch])


def embeddings_of_diffusers(source: Source) -> tuple[Tensor, Tensor]:
    """Text embeddings and pooled ones, as diffusers' pipeline makes and joins them."""
    pipeline = source.pipeline(source.scheduler)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    return text, pooled


@pytest.mark.parametrize("which", ["source", "source_t5"])
def test_the_step_denoiser_is_diffusers_transformer(
    which: str, plan: SamplerPlan, request: pytest.FixtureRequest
) -> None:
    source: Source = request.getfixturevalue(which)
    latents, prompts = inputs(source)
    text, pooled = embeddings_of_diffusers(source)
    assert text.shape == (2, 16 + 256, 96)
    denoiser = StepDenoiser(copy.deepcopy(source.denoiser), torch.from_numpy(plan.timesteps))
    steps = torch.tensor([2, 0])
    with torch.no_grad():
        wanted = source.denoiser(latents, text, pooled, torch.from_numpy(plan.timesteps)[steps]).sample
        assert relative(denoiser(latents, steps, prompts), wanted) <= FLOAT_NOISE
        assert not torch.allclose(denoiser(latents, steps.flip(0), prompts), wanted, atol=1e-3)


def test_the_family_is_chosen_by_the_third_text_encoder(source: Source, source_t5: Source, tmp_path: Path) -> None:
    assert type(source.family) is StableDiffusion3
    assert type(source_t5.family) is StableDiffusion3WithT5
    # a download without T5: the index names it, the folder is not there
    folder = write_tiny_sd3(tmp_path / "model", t5=True)
    (folder / "text_encoder_3").rename(folder / "elsewhere")
    assert type(load_source(folder).family) is StableDiffusion3


def test_what_is_precomputed_is_neither_trained_nor_quantized(source: Source, plan: SamplerPlan) -> None:
    denoiser = StepDenoiser(copy.deepcopy(source.denoiser), torch.from_numpy(plan.timesteps))
    fixed = ("time_text_embed", "context_embedder", "norm1.linear", "norm1_context.linear", "norm_out.linear")
    assert not [name for name, _ in denoiser.named_parameters() if any(part in name for part in fixed)]
    layers = set(source.family.quantizable_layers(source.denoiser))
    assert layers == set(source.family.quantizable_layers(denoiser.model))
    blocks = [f"transformer_blocks.{index}" for index in range(3)]
    wanted = {f"{block}.attn.{part}" for block in blocks for part in ("to_q", "to_k", "to_v", "to_out.0")}
    wanted |= {f"{block}.attn.add_{part}_proj" for block in blocks for part in "qkv"}
    wanted |= {f"{block}.{part}" for block in blocks for part in ("ff.net.0.proj", "ff.net.2")}
    # the last block does not hand the text on
    wanted |= {
        f"{block}.{part}"
        for block in blocks[:-1]
        for part in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    }
    assert layers == wanted | set(KEEP)


def test_the_six_projections_of_a_joint_attention_read_two_tensors(source: Source) -> None:
    spec = find_sites(source.denoiser, STEPS, "w8a8", keep=KEEP)
    attention = "transformer_blocks.0.attn"
    image, text = spec.activation_of[f"{attention}.to_k"], spec.activation_of[f"{attention}.add_v_proj"]
    assert image.consumers == tuple(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v"))
    assert set(text.consumers) == {f"{attention}.add_{part}_proj" for part in "qkv"}


def test_the_prologue_is_the_original_modules(
    source: Source, plan: SamplerPlan, captured: ir.Model, tmp_path: Path
) -> None:
    """Every row of every adaptive normalization, and the projected text."""
    graphs = float_graphs(source, plan, captured)
    _, prompts = inputs(source)
    text, pooled = embeddings_of_diffusers(source)
    session = open_graph(graphs.prologue, tmp_path / "prologue")
    assert {item.name for item in session.get_inputs()} == set(prompts.tensors)
    names = [item.name for item in session.get_outputs()]
    found = dict(zip(names, session.run(None, prompts.numpy()), strict=True))
    model: Any = source.denoiser
    with torch.no_grad():
        np.testing.assert_allclose(found.pop(CONTEXT), model.context_embedder(text).numpy(), atol=1e-5)
        for name, rows in found.items():
            norm = model.get_submodule(name.removesuffix(".modulation"))
            assert rows.shape == (2, STEPS, norm.linear.out_features)
            for step, timestep in enumerate(plan.timesteps):
                embedded = model.time_text_embed(torch.tensor([timestep, timestep]), pooled)
                wanted = norm.linear(norm.silu(embedded)).numpy()
                assert np.abs(wanted).max() > 0.5
                np.testing.assert_allclose(rows[:, step], wanted, atol=2e-5)
    assert len(found) == 3 * 2 + 1


def test_the_float_graph_is_torchs_step_denoiser(source: Source, plan: SamplerPlan, captured: ir.Model) -> None:
    graphs = float_graphs(source, plan, captured)
    latents, prompts = inputs(source)
    reference = StepDenoiser(copy.deepcopy(source.denoiser), torch.from_numpy(plan.timesteps))
    both = Conditioning.cat([source.family.encode_prompts(source, ["", "blue"]), prompts])
    runner = GraphRunner(graphs.denoiser, graphs.prologue, plan, both)
    for step in range(STEPS):
        with torch.no_grad():
            blank, told = reference(torch.cat([latents, latents]), torch.tensor(step), both).chunk(2)
        wanted = (blank + 7 * (told - blank)).numpy()
        assert np.linalg.norm(runner.output(latents, step, 7.0) - wanted) / np.linalg.norm(wanted) < 1e-4


def test_the_blocks_of_stable_diffusion_3_5(source: Source, plan: SamplerPlan, tmp_path: Path) -> None:
    """Two attentions in the first block, their own normalization, and normalized queries and keys."""
    config = {key: value for key, value in source.denoiser.config.items() if not key.startswith("_")}
    model = type(source.denoiser)(**config | {"dual_attention_layers": (0,), "qk_norm": "rms_norm", "num_layers": 2})
    changed = copy.copy(source)
    changed._parts = {**source._parts, "transformer": randomize_(model)}
    spec = find_sites(model, STEPS, "w8a8", keep=KEEP)
    second = spec.activation_of["transformer_blocks.0.attn2.to_k"]
    assert second.consumers == tuple(f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v"))
    captured = source.family.capture_denoiser(model, source.family.latent_shape(source), 16)
    graphs = float_graphs(changed, plan, captured)
    rows = {value.name: value.shape for value in graphs.prologue.graph.outputs}
    assert rows["transformer_blocks.0.norm1.modulation"] == ir.Shape(["batch", STEPS, 9 * 32])
    latents, prompts = inputs(source)
    both = Conditioning.cat([prompts, prompts[[1, 0]]])
    reference = StepDenoiser(copy.deepcopy(model), torch.from_numpy(plan.timesteps))
    with torch.no_grad():
        blank, told = reference(torch.cat([latents, latents]), torch.tensor(1), both).chunk(2)
    wanted = (blank + 2 * (told - blank)).numpy()
    found = GraphRunner(graphs.denoiser, graphs.prologue, plan, both).output(latents, 1, 2.0)
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4


def test_nothing_of_the_time_path_is_left(source: Source, plan: SamplerPlan, captured: ir.Model) -> None:
    graphs = float_graphs(source, plan, captured)
    assert not [node.name for node in graphs.denoiser.graph if "time_text" in (node.name or "")]
    assert not [node.name for node in graphs.denoiser.graph if node.op_type in ("Sin", "Cos", "Einsum")]
    names = [value.name for value in graphs.denoiser.graph.inputs]
    assert names[:5] == ["latents", "guidance_scale", "step", "coefficients", CONTEXT]
    assert all(name is not None and name.endswith(".modulation") for name in names[5:])
    modulation = next(value for value in graphs.denoiser.graph.inputs if value.name == "norm_out.modulation")
    assert modulation.shape == ir.Shape(["2*batch", STEPS, 64])
    run_passes(graphs.denoiser, [CheckerPass(full_check=True)])


def float_graphs(source: Source, plan: SamplerPlan, captured: ir.Model) -> Any:
    tables = source.family.time_tables(source.denoiser, torch.from_numpy(plan.timesteps))
    shape = source.family.latent_shape(source)
    return build_denoiser(captured, source.family.cuts(tables), plan, shape, store_fp16=False)


def test_of_the_position_table_only_the_crop_is_stored(plan: SamplerPlan, tmp_path: Path) -> None:
    """That of the checkpoint, whatever diffusers would compute; the parity of the export is with its transformer."""
    folder = write_tiny_sd3(tmp_path / "model")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["pos_embed.pos_embed"] = torch.randn(1, 24 * 24, 32, generator=torch.Generator().manual_seed(2))
    save_file(weights, file)
    source = load_source(folder)
    wanted = source.denoiser.pos_embed.cropped_pos_embed(8, 8).numpy()
    made = export_package(source, tmp_path / "package", plan, 7.0, PackageSettings(dtype="fp32", vae_encoder=False))
    assert made.report.passed
    constants = [
        value.const_value.numpy()
        for value in ir.load(made.package.component(DENOISER)).graph.initializers.values()
        if value.const_value is not None
    ]
    assert [array.shape for array in constants if np.array_equal(array, wanted)] == [(1, 4 * 4, 32)]
    assert max(array.size for array in constants) < weights["pos_embed.pos_embed"].numel()


@pytest.fixture(scope="module")
def quantized_package(source: Source, plan: SamplerPlan, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    checkpoint = quantized_checkpoint(source, plan, "w4a8", keep=KEEP)
    return export_package(source, tmp_path_factory.mktemp("packages") / "w4a8", plan, 7.0, checkpoint=checkpoint)


def test_a_quantized_package_keeps_parity(quantized_package: ExportResult) -> None:
    assert quantized_package.report.passed
    figures = {criterion.name: criterion for criterion in quantized_package.report.criteria}
    assert {"float_graph", "site_integers", "site_outputs", "quantized_graph"} <= set(figures)
    assert {"text_encoder", "text_encoder_2", "vae_decoder"} <= set(figures)
    assert quantized_package.package.manifest.family == "stable-diffusion-3"


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
def test_other_precisions_keep_parity(source: Source, plan: SamplerPlan, precision: Any, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(source, plan, precision, keep=KEEP, groups=1)
    assert export_package(source, tmp_path / "package", plan, 7.0, checkpoint=checkpoint).report.passed


@pytest.mark.parametrize("which", ["source", "source_t5", "source_medium"])
def test_an_fp32_package_makes_diffusers_images(
    which: str, plan: SamplerPlan, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Source = request.getfixturevalue(which)
    exported = export_package(source, tmp_path / "package", plan, 7.0, PackageSettings(dtype="fp32"))
    assert exported.package.manifest.full_precision == (["text_encoder_3"] if which == "source_t5" else [])
    folder = build_engine(exported.package, "onnxruntime").folder
    pipeline = Pipeline.load(folder, engine="onnxruntime")
    third = {"prompt_3": ["blue", "a star"], "negative_prompt_3": ["x", "y"]} if which == "source_t5" else {}
    for negative, others in ((None, {}), ("green", third)):
        found = pipeline(PROMPTS, negative_prompt=negative, seed=[3, 4], **others)
        wanted = source.pipeline(source.scheduler)(
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 2,
            **others,
            num_inference_steps=STEPS,
            guidance_scale=7.0,
            generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
            output_type="np",
        ).images
        images = np.stack([np.asarray(image, np.float64) / 255 for image in found.images])
        assert psnr(images, np.round(wanted * 255) / 255) >= 50


@pytest.mark.parametrize("engine", ["openvino", "tensorrt-rtx"])
def test_engines_take_it(quantized_package: ExportResult, engine: str) -> None:
    if not backend(engine).available().builds:
        pytest.skip(f"{engine} is not installed")
    package = build_engine(quantized_package.package, engine)
    kernels = package.engine(engine).kernels
    assert kernels is not None
    assert (kernels.quantized_layers, kernels.int8, kernels.fallback) == (33, 33, [])
    if backend(engine).available().works:
        package, criterion = check_built_engine(package, engine, quantized_package)
        assert criterion is not None
        assert criterion.passed
        assert Pipeline.load(package.folder, engine=engine)("a red circle", seed=1).images[0].size == (64, 64)


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_stable_diffusion_3_5_medium_goes_the_whole_road(
    source_medium: Source, plan: SamplerPlan, precision: Any, tmp_path: Path
) -> None:
    """A second query, key, value and output in each of the first two blocks, all in integers."""
    checkpoint = quantized_checkpoint(source_medium, plan, precision, keep=KEEP)
    made = export_package(source_medium, tmp_path / "package", plan, 7.0, checkpoint=checkpoint)
    package = made.package
    for engine in ("openvino", "tensorrt-rtx"):
        package, criterion = check_built_engine(build_engine(package, engine), engine, made)
        kernels = package.engine(engine).kernels
        assert kernels is not None
        assert (kernels.quantized_layers, kernels.int8, kernels.fallback) == (33 + 2 * 4, 33 + 2 * 4, [])
        assert criterion is None or criterion.passed


def prologue_bytes(result: ExportResult) -> int:
    weights = ir.load(result.package.component(PROLOGUE)).graph.initializers.values()
    return sum(value.const_value.nbytes for value in weights if value.const_value is not None)


def test_an_int8_prologue_is_gated_and_smaller(
    source: Source, plan: SamplerPlan, quantized_package: ExportResult, tmp_path: Path
) -> None:
    checkpoint = quantized_checkpoint(source, plan, "w4a8", keep=KEEP)
    small = export_package(
        source, tmp_path / "int8", plan, 7.0, PackageSettings(prologue="int8"), checkpoint=checkpoint
    )
    criterion = next(each for each in small.report.criteria if each.name == "int8_prologue")
    assert criterion.passed
    assert 1 < max(criterion.per_step) < 1.01
    assert prologue_bytes(small) < 0.65 * prologue_bytes(quantized_package)
    # norms, context and text embedder: every weight of the prologue
    stored = ir.load(small.package.component(PROLOGUE)).graph.initializers.values()
    assert sum(value.dtype == ir.DataType.INT8 for value in stored) == 7 + 1 + 2
    package, criterion = check_built_engine(build_engine(small.package, "onnxruntime"), "onnxruntime", small)
    assert criterion is not None
    assert criterion.passed
    build_engine(package, "tensorrt-rtx")
    with pytest.raises(SdqError, match="quantized packages"):
        export_package(source, tmp_path / "float", plan, 7.0, PackageSettings(prologue="int8"))


def test_an_int8_prologue_that_costs_too_much_is_refused(
    source: Source, plan: SamplerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_storage, "INT8", replace(INT8, high=3))  # a grid of seven values
    checkpoint = quantized_checkpoint(source, plan, "w8a8", keep=KEEP)
    with pytest.raises(SdqError, match="INT8 prologue"):
        export_package(source, tmp_path / "package", plan, 7.0, PackageSettings(prologue="int8"), checkpoint=checkpoint)
    assert not (tmp_path / "package").exists()
