"""Text encoders and VAE stored as INT8 and INT4: exact integers, graphs that every engine takes, and what they cost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from sdq_deploy.models import resolve_model
from sdq_engines import Pipeline
from sdq_engines.backends.registry import backend
from sdq_engines.build import build_engine
from sdq_engines.errors import SdqError
from sdq_engines.package.schema import Manifest
from sdq_export.components import make_text_encoder, make_vae_decoder, make_vae_encoder
from sdq_export.families.vae import VaeEncoder
from sdq_export.integer_storage import as_integers, component_layers, round_to_integers_
from sdq_export.parity import ParityReport
from sdq_export.parity.components import check_text_encoder, check_vae_decoder
from sdq_export.parity.rounded import rounded_text_encoder, rounded_vae_decoder, rounded_vae_encoder
from sdq_export.parity.samples import PARITY_PROMPTS
from sdq_export.settings import PackageSettings
from sdq_export.source import Source, load_source
from sdq_export.storage import IntegerDtype
from sdq_export.writer import ExportResult, export_package
from tests.export.conftest import plan_of
from tests.images import psnr


def uneven(layer: nn.Module) -> nn.Module:
    """With channels of very different size, one of them zero, one below FP16's range."""
    weight: Any = layer.weight
    with torch.no_grad():
        weight.mul_((10.0 ** torch.linspace(-7, 3, len(weight))).reshape(-1, *[1] * (weight.ndim - 1)))
        weight[5], weight[6] = 0, 1e-7
    return layer


LAYERS = {
    "linear": lambda: nn.Linear(64, 33),
    "convolution": lambda: nn.Conv2d(4, 33, 3),
    "embedding": lambda: nn.Embedding(33, 20),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_int8_integers_are_found_again_exactly(kind: str) -> None:
    layer = uneven(LAYERS[kind]())
    before = layer.weight.detach().clone()
    round_to_integers_(nn.Sequential(layer), ["0"], "int8")
    rounded = layer.weight.detach()
    found = as_integers(rounded.numpy(), 0)
    assert found is not None
    integers, scale = found
    channels = scale.reshape(-1, *[1] * (rounded.ndim - 1))
    assert scale.shape == (33,)
    assert integers.min() >= -127
    # below the tenth channel an engine in FP16 could not hold the scale that 127 steps ask for
    assert (np.abs(integers).reshape(33, -1).max(axis=1)[10:] == 127).all()
    assert np.abs(integers[5:7]).max() < 3
    assert np.array_equal(integers.astype(np.float32) * channels, rounded.numpy())
    assert ((rounded - before).abs() <= torch.from_numpy(channels) / 2).all()
    assert (scale.astype(np.float16) > 0).all()
    assert as_integers(before.numpy(), 0) is None


@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (96, 32), (16, 16)])
def test_int4_integers_are_found_again_exactly(inputs: int, block: int) -> None:
    layer = uneven(nn.Linear(inputs, 33))
    before = layer.weight.detach().clone()
    round_to_integers_(nn.Sequential(layer), ["0"], "int4")
    rounded = layer.weight.detach()
    found = as_integers(rounded.numpy(), 0, block)
    assert found is not None
    integers, scale = found
    assert scale.shape == (33, inputs // block)
    assert np.abs(integers).max() == 7
    repeated = scale.repeat(block, axis=1)
    assert np.array_equal(integers.astype(np.float32) * repeated, rounded.numpy())
    assert ((rounded - before).abs() <= torch.from_numpy(repeated) / 2).all()
    transposed = as_integers(np.ascontiguousarray(rounded.numpy().T), 1, block)
    assert transposed is not None
    assert np.array_equal(transposed[0].T, integers)
    assert np.array_equal(transposed[1].T, scale)


def test_a_linear_layer_that_no_block_divides_is_int8() -> None:
    layer = nn.Linear(40, 8)
    round_to_integers_(nn.Sequential(layer), ["0"], "int4")
    assert as_integers(layer.weight.detach().numpy(), 0) is not None


def test_a_t5s_two_names_of_one_embedding_and_its_positions() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_ff=32, d_kv=8, num_heads=4, num_layers=1)
    model = transformers.T5EncoderModel(config)
    positions = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.clone()
    round_to_integers_(model, component_layers(model), "int8")
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert as_integers(model.encoder.embed_tokens.weight.detach().numpy(), 0) is not None
    assert torch.equal(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, positions)


def weight_bytes(graph: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)


def fp16_bytes(module: nn.Module) -> int:
    return sum(2 * parameter.numel() for parameter in module.parameters())


def float_weights(graph: ir.Model) -> list[str]:
    """Names of what Conv, MatMul, Gemm and Gather still read in floating point, stored as FP16."""
    return [value.name or "" for value in graph.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]


@pytest.fixture(scope="module")
def shapes() -> Source:
    return load_source(resolve_model("shapes-64"))


@pytest.mark.parametrize(
    ("dtype", "share", "least", "most"), [("int8", 0.55, 0.004, 0.009), ("int4", 0.36, 0.05, 0.09)]
)
def test_a_trained_text_encoder(shapes: Source, dtype: IntegerDtype, share: float, least: float, most: float) -> None:
    (encoder,) = shapes.family.text_encoders
    graph, module = make_text_encoder(shapes, encoder, "fp16", dtype)
    assert check_text_encoder(graph, module, shapes, encoder, PARITY_PROMPTS).passed
    criterion = rounded_text_encoder(module, shapes, encoder, PARITY_PROMPTS, dtype)
    assert least < criterion.worst < most
    assert criterion.passed == (dtype == "int8")
    assert float_weights(graph) == []
    assert weight_bytes(graph) < share * fp16_bytes(module)
    stored = [value.dtype for value in graph.graph.initializers.values()]
    assert stored.count(ir.DataType.INT8) == (1 + 3 * 6 if dtype == "int8" else 1)
    assert stored.count(ir.DataType.INT4) == (0 if dtype == "int8" else 3 * 6)


def test_a_trained_vae(shapes: Source) -> None:
    latents = torch.randn(1, *shapes.family.latent_shape(shapes), generator=torch.Generator().manual_seed(0))
    graph, module = make_vae_decoder(shapes, "fp16", integers="int8")
    _, encoder = make_vae_encoder(shapes, "fp16", integers="int8")
    assert check_vae_decoder(graph, module, latents).passed
    assert float_weights(graph) == []
    decoder = nn.ModuleList([shapes.vae.decoder, shapes.vae.post_quant_conv])
    assert weight_bytes(graph) < 0.52 * fp16_bytes(decoder)
    for criterion in (
        rounded_vae_decoder(module, shapes, latents, "int8"),
        rounded_vae_encoder(encoder, shapes, latents, "int8"),
    ):
        assert criterion.passed
        assert 50 < criterion.details["psnr"] < 70
        assert criterion.details["psnr"] == pytest.approx(-20 * np.log10(criterion.worst))


@pytest.fixture(scope="module")
def small(source: Source, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A tiny package whose text encoder and VAE decoder are INT8."""
    out = tmp_path_factory.mktemp("packages") / "int8"
    return export_package(
        source,
        out,
        plan_of(source, "ddim", 2),
        4.0,
        PackageSettings(text_encoder="int8", vae="int8", vae_encoder=False),
    )


def test_a_package_says_what_its_integers_cost(small: ExportResult) -> None:
    manifest: Manifest = small.package.manifest
    parity = manifest.fidelity["parity"]
    assert parity["text_encoder_int8"]["worst"] <= parity["text_encoder_int8"]["limit"] == 0.03
    assert parity["vae_decoder_int8"]["details"]["psnr"] >= 46
    assert "hint" not in parity["vae_decoder_int8"]
    assert parity["text_encoder"]["worst"] < 1e-4


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "tensorrt-rtx"])
def test_every_engine_takes_them(small: ExportResult, engine: str) -> None:
    if not backend(engine).available().builds:
        pytest.skip(f"{engine} is not installed")
    package = build_engine(small.package, engine)
    if not backend(engine).available().works:
        return
    pipeline = Pipeline.load(package.folder, engine=engine)
    wanted = wanted_images(small)
    found = np.asarray(pipeline("a red circle", seed=1).images[0], np.float64) / 255
    assert psnr(found, wanted) > 40


def wanted_images(small: ExportResult) -> np.ndarray:
    """What diffusers draws with the rounded text encoder and VAE, [64, 64, 3] in [0, 1]."""
    source = load_source(small.package.manifest.source.model)
    for part in ("text_encoder", "vae"):
        round_to_integers_(source.part(part), component_layers(source.part(part)), "int8")
    scheduler = source.scheduler
    images = source.pipeline(scheduler)(
        "a red circle",
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    return np.asarray(images[0], np.float64)


def test_what_costs_too_much_is_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(SdqError, match=r"text encoder's INT4 weights.*nothing was written") as raised:
        export_package(
            source, tmp_path / "package", plan_of(source, "ddim", 2), 4.0, PackageSettings(text_encoder="int4")
        )
    assert "--text-encoder int8" in (raised.value.hint or "")
    assert not (tmp_path / "package").exists()
    vae = nn.ModuleDict({"vae": copy.deepcopy(source.vae)})
    round_to_integers_(vae, [f"vae.{layer}" for layer in component_layers(source.vae)], "int8")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    criterion = rounded_vae_encoder(VaeEncoder(vae["vae"]), source, latents, "int8")
    with pytest.raises(SdqError, match="image by the vae encoder's INT8 weights") as raised:
        ParityReport(criteria=(criterion,)).require()
    assert "leave --vae out" in (raised.value.hint or "")


def test_a_text_encoder_of_int4_numbers_loses_nothing(source: Source) -> None:
    (encoder,) = source.family.text_encoders
    trained = copy.copy(source)
    trained._parts = {**source._parts, encoder.component: copy.deepcopy(source.part(encoder.component))}
    part: Any = trained.part(encoder.component)
    round_to_integers_(part, component_layers(part), "int4")
    again = copy.deepcopy(part)
    round_to_integers_(again, component_layers(again), "int4")
    assert rounded_text_encoder(encoder.wrap(again), trained, encoder, PARITY_PROMPTS, "int4").worst == 0
    assert rounded_text_encoder(encoder.wrap(again), source, encoder, PARITY_PROMPTS, "int4").worst > 0.03
