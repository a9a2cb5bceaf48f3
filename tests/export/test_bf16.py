"""A checkpoint in BF16: stored as it is, taken by every engine; components that NVIDIA engines build in BF16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq_engines import Pipeline
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.store import Package
from sdq_export.sampler import compile_sampler
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.writer import export_package
from tests.export.quantized import quantized_checkpoint
from tests.images import psnr
from tests.tiny import write_tiny_sd3

pytestmark = pytest.mark.slow

STEPS, GUIDANCE = 3, 5.0
BEYOND_FP16 = {
    "transformer": "transformer_blocks.0.ff.net.0.proj.weight",
    "text_encoder_3": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    "vae": "decoder.conv_in.weight",
}
"""A weight of each part that gets a number too small for FP16: BF16 holds it, FP16 would make it 0."""
T5 = "text_encoder_3"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Stable Diffusion 3 with T5, saved with torch_dtype=bfloat16."""
    folder = write_tiny_sd3(tmp_path_factory.mktemp("bf16") / "model", t5=True)
    for file in folder.rglob("*.safetensors"):
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
        if file.parent.name in BEYOND_FP16:
            weights[BEYOND_FP16[file.parent.name]].view(-1)[5] = 2.0**-30
        save_file(weights, file, metadata={"format": "pt"})
    return load_source(folder)


@pytest.fixture(scope="module")
def package(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Package:
    plan = compile_sampler(source.scheduler, STEPS)
    return export_package(source, tmp_path_factory.mktemp("bf16") / "package", plan, GUIDANCE).package


@pytest.mark.parametrize(("component", "part"), [("denoiser", "transformer"), (T5, T5), ("vae_decoder", "vae")])
def test_what_fp16_cannot_hold_is_stored_as_bf16(package: Package, component: str, part: str) -> None:
    constants = ir.load(package.component(component)).graph.initializers.values()
    short = {value.name: value.const_value for value in constants if value.dtype == ir.DataType.BFLOAT16}
    assert f"{BEYOND_FP16[part]}.bf16" in {str(name)[-len(BEYOND_FP16[part]) - 5 :] for name in short}
    for tensor in short.values():
        assert tensor is not None
        exact = tensor.numpy().astype(np.float32)
        assert not np.array_equal(exact.astype(np.float16).astype(np.float32), exact)
    assert sum(value.dtype == ir.DataType.FLOAT16 for value in constants) > 5


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nothing_is_lost(source: Source, package: Package, engine: str) -> None:
    """The images are those of diffusers' pipeline with the checkpoint's own weights, in FP32."""
    built = build_engine(package, engine)
    found = np.asarray(Pipeline.load(built.folder, engine=engine)("a red circle", seed=3).images[0], np.float64) / 255
    wanted = source.pipeline(source.scheduler)(
        "a red circle",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert psnr(found, np.round(wanted[0] * 255) / 255) >= 50


def plan_bytes(package: Package) -> dict[str, int]:
    """Component -> bytes of its plan."""
    entry = package.manifest.engines["tensorrt-rtx"]
    return {name: package.manifest.files[path].size for name, path in entry.components.items() if path}


def test_nvidia_engines_build_it_and_a_component_in_bf16(package: Package) -> None:
    built = build_engine(package, "tensorrt-rtx")
    assert built.manifest.engines["tensorrt-rtx"].options == {"fp32": [T5]}
    before = plan_bytes(built)
    built = build_engine(package, "tensorrt-rtx", options={"bf16": [T5, "vae_decoder"]})
    assert built.manifest.engines["tensorrt-rtx"].options == {"bf16": [T5, "vae_decoder"]}
    after = plan_bytes(built)
    assert after[T5] < before[T5]
    assert {name for name in after if after[name] != before[name]} == {T5, "vae_decoder"}
    with pytest.raises(SdqError, match="vae_decoder was asked for in FP32 and in BF16"):
        build_engine(package, "tensorrt-rtx", options={"bf16": ["vae_decoder"], "fp32": ["vae_decoder"]})


def test_a_quantized_denoiser_is_not_built_in_bf16(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = load_source(tiny("sd3"))
    plan = compile_sampler(source.scheduler, 2)
    checkpoint = quantized_checkpoint(source, plan, "w8a8", keep=("pos_embed.proj", "proj_out"), groups=1)
    made = export_package(
        source, tmp_path / "package", plan, 7.0, PackageSettings(vae_encoder=False), checkpoint=checkpoint
    )
    with pytest.raises(SdqError, match="scales lose too much in BF16"):
        build_engine(made.package, "tensorrt-rtx", options={"bf16": ["denoiser"]})
