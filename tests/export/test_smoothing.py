"""Smoothing and shortcut splitting: the denoiser computes what it did, and a package of such a denoiser is faithful."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from sdq_engines.formats import INT8
from sdq_export.quantspec import ActivationSite, QuantSpec, WeightSite
from sdq_export.shortcuts import SplitShortcut, split_shortcuts
from sdq_export.sites import find_sites
from sdq_export.smoothing import INVERSE, smooth_, smoothed_sites, smoothing_key
from sdq_export.source import Source
from sdq_export.writer import export_package
from tests.export.conftest import GUIDANCE, plan_of
from tests.export.quantized import quantized_checkpoint, random_factors


def outputs(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(latents, 300, text, return_dict=False)[0]
    return found


def test_a_smoothed_denoiser_computes_the_same(source: Source) -> None:
    spec = find_sites(source.denoiser, 4, "w8a8")
    smoothed = smooth_(copy.deepcopy(source.denoiser), spec, random_factors(source.denoiser, spec))
    layer = spec.activations[0].consumers[0]
    assert not torch.allclose(
        smoothed.get_parameter(f"{layer}.weight"), source.denoiser.get_parameter(f"{layer}.weight")
    )
    torch.testing.assert_close(outputs(smoothed), outputs(source.denoiser), rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_smoothed_layer_divides_by_its_own_factors() -> None:
    spec = QuantSpec(
        precision="w8a8",
        num_steps=1,
        weights=(WeightSite(layer="layer", op="linear", format=INT8),),
        activations=(ActivationSite(name="layer.input", consumers=("layer",), groups=(0,)),),
    )
    layer = smooth_(_OneLayer(), spec, {smoothing_key(spec.activations[0].name): torch.tensor([2.0, 4.0])})
    other = copy.deepcopy(layer)
    other.get_submodule("layer").register_buffer(INVERSE, torch.zeros(2))
    x = torch.ones(1, 2)
    assert other(x).item() == 0
    assert layer(x).item() == pytest.approx(2)


class _OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


def test_a_site_without_factors_is_left_alone(source: Source) -> None:
    spec = find_sites(source.denoiser, 4, "w8a8")
    first, *others = spec.activations
    factors = random_factors(source.denoiser, spec)
    only = {smoothing_key(first.name): factors[smoothing_key(first.name)]}
    assert smoothed_sites(spec, only) == (first.name,)
    smoothed = smooth_(copy.deepcopy(source.denoiser), spec, only)
    assert hasattr(smoothed.get_submodule(first.consumers[0]), INVERSE)
    assert not any(hasattr(smoothed.get_submodule(layer), INVERSE) for site in others for layer in site.consumers)


def test_split_shortcuts_compute_the_same(source: Source) -> None:
    split: Any = split_shortcuts(source.denoiser)
    halves = {name: module for name, module in split.named_modules() if isinstance(module, SplitShortcut)}
    assert halves
    assert all(name.startswith("up_blocks.") for name in halves)
    torch.testing.assert_close(outputs(split), outputs(source.denoiser), rtol=1e-4, atol=1e-5)


def test_the_halves_of_a_shortcut_are_sites_of_their_own(source: Source) -> None:
    split = source.with_split_shortcuts()
    spec = find_sites(split.denoiser, 4, "w4a8")
    hidden = [site for site in spec.activations if site.name.endswith("conv_shortcut.hidden.input")]
    skip = [site for site in spec.activations if site.name.endswith("conv_shortcut.skip.input")]
    assert len(hidden) == len(skip) > 0
    assert spec.splits_shortcuts
    assert source.for_spec(spec).denoiser.state_dict().keys() == split.denoiser.state_dict().keys()
    assert not find_sites(source.denoiser, 4, "w4a8").splits_shortcuts


@pytest.mark.parametrize("groups", [None, 1])
def test_a_smoothed_and_split_package_is_faithful(source: Source, tmp_path: Path, groups: int | None) -> None:
    """Export's own gate compares integers, layers and trajectory with torch."""
    plan = plan_of(source, "ddim")
    checkpoint = quantized_checkpoint(source.with_split_shortcuts(), plan, "w4a8", groups, smooth=True)
    result = export_package(source, tmp_path / "package", plan, GUIDANCE, checkpoint=checkpoint)
    assert all(criterion.passed for criterion in result.report.criteria)
    model = onnx.load(tmp_path / "package" / "denoiser" / "model.onnx")
    products = [node.name for node in model.graph.node if node.name.endswith("/smooth")]
    # one product a site, though query, key and value read one each in torch
    assert len(products) == len(checkpoint.spec.activations)
