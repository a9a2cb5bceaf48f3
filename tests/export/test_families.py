"""Stable Diffusion 2 and XL: packages make the images of diffusers' own pipelines, their parts are the modules'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines import Pipeline
from sdq_engines.backends.onnxruntime import open_session
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.lowering.fp16 import ToFloat16
from sdq_engines.lowering.graph import apply, load_graph
from sdq_engines.lowering.save import save_graph
from sdq_engines.package.layout import PROLOGUE, VAE_DECODER, VAE_ENCODER
from sdq_engines.package.store import open_package
from sdq_export.conditioning import POOLED_INPUT, SIZE_INPUT, TEXT_INPUT, Conditioning
from sdq_export.engines import check_built_engine
from sdq_export.families import network_of
from sdq_export.families.sd import StableDiffusion
from sdq_export.families.sdxl import StableDiffusionXL
from sdq_export.sampler import make_scheduler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.stepping import StepDenoiser
from sdq_export.writer import ExportResult, export_package
from tests.export.conftest import plan_of
from tests.export.quantized import quantized_checkpoint
from tests.images import psnr
from tests.tiny import tiny_sd2_unet, tiny_sdxl_unet

pytestmark = pytest.mark.slow

PROMPTS, SEEDS, STEPS, GUIDANCE = ["a red circle", "two blue stars on a white background"], [3, 4], 4, 5.0


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def source(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Source:
    """A checkpoint of each family, loaded."""
    return load_source(tiny(request.param))


@pytest.fixture(scope="module")
def sdxl(tiny: Callable[[str], Path]) -> Source:
    """The tiny SDXL."""
    return load_source(tiny("sdxl"))


def diffusers_images(source: Source, scheduler: str, **options: Any) -> NDArray[np.float32]:
    """What diffusers' own pipeline makes, float32 [2, h, w, 3] in [0, 1], rounded to 8 bits."""
    images: NDArray[np.float32] = source.pipeline(make_scheduler(scheduler, source.scheduler.config))(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
        **options,
    ).images
    return np.round(images * 255) / 255


def package_images(pipe: Pipeline, **options: Any) -> NDArray[np.float32]:
    made = pipe(PROMPTS, seed=SEEDS, guidance_scale=GUIDANCE, **options)
    return np.stack([np.asarray(image, np.float32) / 255 for image in made.images])


Exported = Callable[[Source, str], ExportResult]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The FP32 package of a checkpoint and a scheduler, on onnxruntime; not to be changed."""
    made: dict[tuple[Path, str], ExportResult] = {}

    def get(source: Source, scheduler: str) -> ExportResult:
        if (source.folder, scheduler) not in made:
            out, plan = tmp_path_factory.mktemp("packages") / scheduler, plan_of(source, scheduler, STEPS)
            result = export_package(source, out, plan, GUIDANCE, PackageSettings(dtype="fp32"))
            built = build_engine(result.package, "onnxruntime")
            made[source.folder, scheduler] = replace(result, package=built)
        return made[source.folder, scheduler]

    return get


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
def test_an_fp32_package_makes_diffusers_images(source: Source, exported: Exported, scheduler: str) -> None:
    pipe = Pipeline.from_package(exported(source, scheduler).package)
    plain = diffusers_images(source, scheduler)
    assert psnr(package_images(pipe), plain) >= 50
    negative = diffusers_images(source, scheduler, negative_prompt=["blue", "a circle"])
    assert psnr(package_images(pipe, negative_prompt=["blue", "a circle"]), negative) >= 50
    assert psnr(plain, negative) < 40  # the negative prompt matters, so the figures above are not met by chance


def test_one_prompt_one_image_without_guidance(source: Source, exported: Exported) -> None:
    pipe = Pipeline.from_package(exported(source, "euler").package)
    wanted = source.pipeline(make_scheduler("euler", source.scheduler.config))(
        PROMPTS[0], num_inference_steps=STEPS, guidance_scale=1.0, generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images  # fmt: skip
    found = pipe(PROMPTS[0], seed=3, guidance_scale=1.0).images
    assert psnr(np.asarray(found[0], np.float32) / 255, np.round(wanted[0] * 255) / 255) >= 50


def test_the_step_denoiser_is_the_original_at_mixed_steps(source: Source) -> None:
    timesteps, steps = torch.tensor([981.0, 500.0, 1.0]), torch.tensor([0, 2, 1, 1])
    denoiser = StepDenoiser(copy.deepcopy(source.denoiser), timesteps)
    prompts = source.family.encode_prompts(["a red circle", None, "", "blue"])
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = source.family.network.predict(source.denoiser, latents, timesteps[steps], prompts)
        found = denoiser(latents, steps, prompts)
        others = denoiser(latents, steps.flip(0), prompts)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(others, wanted, atol=1e-3)
    assert [name for name, _ in denoiser.named_parameters() if "time_" in name or "add_" in name] == []


def test_gradients_are_the_same_with_checkpointing(source: Source) -> None:
    """A second forward with other steps comes between forward and backward."""
    prompts = source.family.encode_prompts(["a red circle", "blue"])
    latents, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    gradients = []
    for checkpointed in (False, True):
        original = copy.deepcopy(source.denoiser).requires_grad_(True)
        denoiser = StepDenoiser(original, torch.tensor([981.0, 1.0])).train()
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        loss = denoiser(latents, steps, prompts).square().mean()
        denoiser(latents, steps.flip(0), prompts)
        loss.backward()
        gradients.append([each.grad.clone() for each in denoiser.parameters() if each.grad is not None])
    assert len(gradients[0]) == len(list(denoiser.parameters()))
    assert max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)) == 0.0


def test_prologue_outputs_are_what_the_original_modules_give(source: Source, exported: Exported) -> None:
    result = exported(source, "euler")
    prompts = source.family.encode_prompts(["a red circle", None, "blue"])
    wanted = _keys_and_values(source, prompts) | _time_rows(source, prompts, torch.from_numpy(result.plan.timesteps))
    session = open_session(result.package.component(PROLOGUE), threads=1)
    names = [output.name for output in session.get_outputs()]
    assert names == result.package.manifest.io.prologue_outputs
    assert set(names) == set(wanted)
    found = dict(zip(names, session.run(names, prompts.numpy()), strict=True))
    for name, tensor in wanted.items():
        difference = np.linalg.norm(found[name] - tensor.numpy()) / np.linalg.norm(tensor.numpy())
        assert difference < 1e-5, name


def _keys_and_values(source: Source, prompts: Conditioning) -> dict[str, Tensor]:
    text = prompts.tensors[TEXT_INPUT]
    return {
        f"{name}.{part}": getattr(module, layer)(text)
        for name, module in source.denoiser.named_modules()
        if name.endswith("attn2")
        for part, layer in (("key", "to_k"), ("value", "to_v"))
    }


def _time_rows(source: Source, prompts: Conditioning, timesteps: Tensor) -> dict[str, Tensor]:
    """What each ResNet block adds to conv1's product, by diffusers' own methods; nothing where no prompt is in it."""
    if POOLED_INPUT not in prompts.tensors:
        return {}
    unet = source.denoiser
    added = {"text_embeds": prompts.tensors[POOLED_INPUT], "time_ids": prompts.tensors[SIZE_INPUT]}
    rows: dict[str, list[Tensor]] = {}
    for timestep in timesteps:
        embedding = unet.time_embedding(unet.time_proj(timestep.expand(len(prompts))))
        embedding = embedding + unet.get_aug_embed(embedding, prompts.tensors[TEXT_INPUT], added)
        for name, block in unet.named_modules():
            if hasattr(block, "time_emb_proj"):
                row = block.time_emb_proj(block.nonlinearity(embedding)) + block.conv1.bias
                rows.setdefault(f"{name}.time_rows", []).append(row)
    return {name: torch.stack(parts, dim=1) for name, parts in rows.items()}


def test_a_quantized_package_keeps_parity_on_every_engine(source: Source, tmp_path: Path) -> None:
    """At W8A8; W4A8 goes the whole road in tests/deploy/training/test_families.py."""
    plan = plan_of(source, "euler", STEPS)
    checkpoint = quantized_checkpoint(source, plan, "w8a8")
    result = export_package(source, tmp_path / "package", plan, GUIDANCE, checkpoint=checkpoint)
    package = result.package
    for engine in ("onnxruntime", "openvino", "tensorrt-rtx"):
        package, criterion = check_built_engine(build_engine(package, engine), engine, result)
        assert criterion is None or criterion.passed
    stored = onnx.load(package.component(PROLOGUE)).graph.initializer
    assert {each.data_type for each in stored if np.prod(each.dims) > 1000} == {onnx.TensorProto.FLOAT16}
    built = open_package(package.folder).manifest
    assert built.engines["tensorrt-rtx"].options == (
        {"fp32": [VAE_DECODER, VAE_ENCODER]} if built.full_precision else {}
    )
    for engine in ("tensorrt-rtx", "openvino"):
        kernels = built.engines[engine].kernels
        assert kernels is not None
        assert kernels.int8 >= 0.95 * kernels.quantized_layers, engine
    quantized = package_images(Pipeline.from_package(package, "openvino"))
    assert psnr(quantized, diffusers_images(source, "euler")) > 15


def test_guidance_without_a_negative_prompt_sees_zeros(sdxl: Source, exported: Exported) -> None:
    pipe = Pipeline.from_package(exported(sdxl, "ddim").package)
    absent, empty = diffusers_images(sdxl, "ddim"), diffusers_images(sdxl, "ddim", negative_prompt=["", ""])
    assert psnr(absent, empty) < 45
    assert psnr(package_images(pipe), absent) >= 50
    assert psnr(package_images(pipe, negative_prompt=""), empty) >= 50


def test_a_checkpoint_that_forces_no_zeros(sdxl: Source, tmp_path: Path) -> None:
    changed = copy.copy(sdxl)
    changed.index = {**sdxl.index, "force_zeros_for_empty_prompt": False}
    result = export_package(
        changed, tmp_path / "package", plan_of(changed, "ddim", STEPS), GUIDANCE, PackageSettings(dtype="fp32")
    )
    assert not result.package.manifest.io.force_zeros_for_empty_prompt
    pipe = Pipeline.from_package(build_engine(result.package, "onnxruntime"))
    assert psnr(package_images(pipe), diffusers_images(changed, "ddim")) >= 50


def test_the_size_is_told(sdxl: Source, exported: Exported) -> None:
    pipe = Pipeline.from_package(exported(sdxl, "ddim").package)
    size = {"original_size": (256, 100), "crops_coords_top_left": (30, 5), "target_size": (80, 128)}
    wanted = diffusers_images(sdxl, "ddim", **size)
    assert psnr(diffusers_images(sdxl, "ddim"), wanted) < 45
    assert psnr(package_images(pipe, **size), wanted) >= 50
    with pytest.raises(SdqError, match="two numbers"):
        pipe("a red circle", original_size=(1,))


def test_other_models_take_no_size(tiny: Callable[[str], Path], exported: Exported) -> None:
    pipe = Pipeline.from_package(exported(load_source(tiny("sd2")), "ddim").package)
    with pytest.raises(SdqError, match="takes no original_size"):
        pipe("a red circle", original_size=(64, 64))


def test_the_vae_stays_in_fp32_where_its_config_asks(sdxl: Source, exported: Exported) -> None:
    assert exported(sdxl, "ddim").package.manifest.full_precision == [VAE_DECODER, VAE_ENCODER]
    assert sdxl.vae.config.force_upcast
    sdxl.vae.register_to_config(force_upcast=False)
    try:
        assert sdxl.family.full_precision == ()
    finally:
        sdxl.vae.register_to_config(force_upcast=True)


def test_the_sizes_angles_survive_fp16(sdxl: Source, exported: Exported, tmp_path: Path) -> None:
    """In FP16 the angle of a size of 1,999 pixels would be off by half a radian, its sinusoid by as much."""
    package = exported(sdxl, "ddim").package
    prompts = sdxl.family.encode_prompts(["a red circle"]).tensors
    size = torch.tensor([[1999.0, 1777.0, 1501.0, 333.0, 1999.0, 1777.0]])
    feeds = Conditioning({**prompts, SIZE_INPUT: size}).numpy()
    path = package.component(PROLOGUE)
    half = save_graph(apply(load_graph(path), [ToFloat16()]), tmp_path / "half")
    sessions = [open_session(file, threads=1) for file in (path, half)]
    kinds = {item.name: item.type for item in sessions[1].get_inputs()}
    assert kinds == {TEXT_INPUT: "tensor(float16)", POOLED_INPUT: "tensor(float16)", SIZE_INPUT: "tensor(float)"}
    given = {name: array if "16" not in kinds[name] else array.astype(np.float16) for name, array in feeds.items()}
    names = [name for name in package.manifest.io.prologue_outputs if name.endswith("time_rows")]
    wanted, found = sessions[0].run(names, feeds), sessions[1].run(names, given)
    for name, one, other in zip(names, found, wanted, strict=True):
        assert np.linalg.norm(one.astype(np.float32) - other) < 5e-3 * np.linalg.norm(other), name


def test_the_time_path_computes_in_fp32_under_autocast(sdxl: Source) -> None:
    denoiser = StepDenoiser(copy.deepcopy(sdxl.denoiser), torch.tensor([981.0, 1.0]))
    prompts = sdxl.family.encode_prompts(["a red circle", "blue"])
    latents, steps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    rows: list[Tensor] = []
    block = denoiser.model.mid_block.resnets[0]
    block.time_emb_proj.register_forward_hook(lambda _, __, output: rows.append(output))
    with torch.no_grad():
        plain = denoiser(latents, steps, prompts)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = denoiser(latents, steps, prompts)
    assert not torch.equal(plain, rounded.float())
    assert torch.equal(*rows)


def test_families_know_their_denoisers() -> None:
    assert network_of(tiny_sd2_unet()) is StableDiffusion.network
    assert network_of(tiny_sdxl_unet()) is StableDiffusionXL.network
    with pytest.raises(SdqError, match="Linear"):
        network_of(torch.nn.Linear(1, 1))


def test_the_refiners_form_is_refused(sdxl: Source) -> None:
    changed = copy.copy(sdxl)
    config = {key: value for key, value in sdxl.skeleton.config.items() if not key.startswith("_")}
    config["projection_class_embeddings_input_dim"] -= 8
    changed.skeleton = UNet2DConditionModel.from_config(config)
    with pytest.raises(SdqError, match="add_embedding"):
        changed.family.check()
