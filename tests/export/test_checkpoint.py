"""The quantized checkpoint: round trip, damage, and the reference that is built from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_engines.formats import INT4, INT8, PrecisionName
from sdq_export.checkpoint import (
    CheckpointInfo,
    SamplerSettings,
    SourceRef,
    dequantize_weight,
    load_checkpoint,
    quantize_weight,
    save_checkpoint,
    scale_key,
    weight_key,
    weight_scale_key,
)
from sdq_export.quantspec import QuantSpec, WeightSite
from sdq_export.reference import build_reference
from sdq_export.rounding import fake_quantize
from sdq_export.sites import find_sites
from sdq_export.stepping import StepDenoiser
from tests.tiny import WIDTH, prompt_rows, tiny_unet

TIMESTEPS = torch.tensor([981, 500, 1])


def plain_checkpoint(precision: PrecisionName = "w8a8") -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """The tiny UNet quantized by the greatest magnitudes, activations on a grid of 0.05."""
    unet = tiny_unet()
    spec = find_sites(unet, len(TIMESTEPS), precision)
    stepped = StepDenoiser(tiny_unet(), TIMESTEPS)
    tensors = {name: parameter.detach().clone() for name, parameter in stepped.model.named_parameters()}
    for site in spec.weights:
        weight = tensors[weight_key(site.layer)]
        rows = weight.reshape(len(weight), -1, site.format.block_size) if site.format.block_size else weight.flatten(1)
        scale = rows.abs().amax(-1) / site.format.high
        tensors[weight_scale_key(site.layer)] = scale
        tensors[weight_key(site.layer)] = quantize_weight(weight, scale, site)
    for activation in spec.activations:
        tensors[scale_key(activation.name)] = torch.full((activation.num_groups,), 0.05)
    sampler = SamplerSettings(scheduler="DDIMScheduler", config={}, num_inference_steps=3, guidance_scale=4.0)
    return CheckpointInfo(spec=spec, sampler=sampler, source=SourceRef(model="tiny", sha256="0" * 64)), tensors


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
def test_round_trip(tmp_path: Path, precision: PrecisionName) -> None:
    info, tensors = plain_checkpoint(precision)
    save_checkpoint(tmp_path / "checkpoint", info, tensors)
    for folder in (tmp_path, tmp_path / "checkpoint"):
        loaded = load_checkpoint(folder)
        assert loaded.info == info
        assert loaded.tensors.keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)


def test_blocks_have_their_own_scales() -> None:
    site = WeightSite(layer="a", op="linear", format=INT4.in_blocks(16))
    weight = torch.cat([torch.full((2, 16), 0.7), torch.full((2, 16), 7.0)], dim=1)
    scale = torch.tensor([[0.1, 1.0], [0.1, 1.0]])
    integers = quantize_weight(weight, scale, site)
    assert integers.unique().tolist() == [7]
    assert torch.allclose(dequantize_weight(integers, scale, site), weight)


def test_rounds_half_to_even_and_clips() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0])
    assert fake_quantize(x, torch.tensor(1.0), INT8).tolist() == [0.0, 2.0, 2.0, -0.0, 127.0, -128.0]


def test_the_reference_quantizes_and_can_be_bypassed() -> None:
    info, tensors = plain_checkpoint("w8a8")
    reference = build_reference(tiny_unet(), info.spec, tensors, TIMESTEPS)
    teacher = StepDenoiser(tiny_unet(), TIMESTEPS)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = prompt_rows(torch.randn(3, 5, WIDTH, generator=generator))
    steps = torch.arange(3)
    with torch.no_grad():
        wanted = teacher(latents, steps, text)
        error = (reference(latents, steps, text) - wanted).norm() / wanted.norm()
        for quantizer in reference.quantizers.values():
            quantizer.enabled = False
        weights_only = (reference(latents, steps, text) - wanted).norm() / wanted.norm()
    assert 0 < weights_only < error < 0.2


def test_a_tensor_that_is_missing_or_left_over_is_named() -> None:
    info, tensors = plain_checkpoint("w8a8")
    kept = next(name for name in tensors if name.endswith(".bias"))
    with pytest.raises(SdqError, match=rf"lacks the tensor {re.escape(kept)}") as refused:
        build_reference(tiny_unet(), info.spec, {k: v for k, v in tensors.items() if k != kept}, TIMESTEPS)
    assert refused.value.hint
    foreign = {"other.weight": torch.ones(1), "other.z": torch.ones(1)}
    with pytest.raises(SdqError, match=r"does not take, the tensor other\.weight and 1 more"):
        build_reference(tiny_unet(), info.spec, tensors | foreign, TIMESTEPS)


def test_the_quantizers_go_where_the_reference_goes() -> None:
    info, tensors = plain_checkpoint("w8a8")
    reference = build_reference(tiny_unet(), info.spec, tensors, TIMESTEPS)
    assert set(reference.quantizers) == {site.name for site in info.spec.activations}
    reference.to(torch.float64)
    assert {each.per_step.dtype for each in reference.quantizers.values()} == {torch.float64}
    with reference.quantizers_off():
        assert not any(each.enabled for each in reference.quantizers.values())
    assert all(each.enabled for each in reference.quantizers.values())


def test_each_step_has_its_own_scale() -> None:
    info, tensors = plain_checkpoint("w8a8")
    site = info.spec.activations[0]
    tensors[scale_key(site.name)] = torch.tensor([0.01, 0.02, 0.5])
    quantizer = build_reference(tiny_unet(), info.spec, tensors, TIMESTEPS).quantizers[site.name]
    x = torch.full((3, 2), 0.26)
    with quantizer.state.during(torch.tensor([2, 1, 0])):
        assert torch.allclose(quantizer(x)[:, 0], torch.tensor([0.5, 0.26, 0.26]))


def test_an_unfinished_or_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SdqError, match="no finished quantized checkpoint"):
        load_checkpoint(tmp_path)
    info, tensors = plain_checkpoint()
    save_checkpoint(tmp_path, info, tensors)
    data = (tmp_path / "denoiser.safetensors").read_bytes()
    (tmp_path / "denoiser.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SdqError, match="damaged"):
        load_checkpoint(tmp_path)


def test_missing_tensors_are_not_saved(tmp_path: Path) -> None:
    info, tensors = plain_checkpoint()
    missing = weight_scale_key(info.spec.weights[0].layer)
    del tensors[missing]
    with pytest.raises(ValueError, match=missing):
        save_checkpoint(tmp_path, info, tensors)
    assert list(tmp_path.iterdir()) == []


def test_the_spec_is_the_one_contract() -> None:
    info, _ = plain_checkpoint()
    assert QuantSpec.model_validate_json(info.spec.model_dump_json()) == info.spec
