"""Folded factors: the function stays, the balance changes; AWQ's errors are those of the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdq_deploy.training.methods.activation_statistics import ChannelStatistics
from sdq_deploy.training.methods.awq import awq_factors, clipped_scale, output_error
from sdq_deploy.training.methods.smoothing import (
    FoldPoint,
    find_fold_points,
    fold_factors,
    smoothquant_factors,
)
from sdq_deploy.training.search import search_weight_scale
from sdq_engines.formats import INT4
from sdq_export.checkpoint import dequantize_weight, quantize_weight
from sdq_export.quantspec import WeightSite
from sdq_export.sites import find_sites
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.test_modelopt_backend import TIMESTEPS, inputs
from tests.tiny import tiny_unet

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def random_factors(unet: nn.Module, points: list[FoldPoint]) -> dict[FoldPoint, Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = [unet.get_parameter(f"{point.readers[0]}.weight").shape[1] for point in points]
    return {p: torch.exp(torch.randn(w, generator=generator)) for p, w in zip(points, widths, strict=True)}


def test_fold_points_are_the_four_cases() -> None:
    unet = tiny_unet()
    points = {point.readers: point for point in find_fold_points(unet, find_sites(unet, 4, "w8a8"))}
    own = tuple(f"{BLOCK}.attn1.{layer}" for layer in ("to_q", "to_k", "to_v"))
    assert points[own].producer == f"{BLOCK}.norm1"
    assert points[(f"{BLOCK}.attn2.to_q",)].producer == f"{BLOCK}.norm2"
    assert points[(f"{BLOCK}.attn1.to_out.0",)].producer == f"{BLOCK}.attn1.to_v"
    assert points[(f"{BLOCK}.attn2.to_out.0",)].producer == f"{BLOCK}.attn2.to_v"
    assert points[(f"{BLOCK}.ff.net.0.proj",)].producer == f"{BLOCK}.norm3"
    assert points[(f"{BLOCK}.ff.net.2",)] == FoldPoint((f"{BLOCK}.ff.net.2",), f"{BLOCK}.ff.net.0.proj", 256)
    assert points[("mid_block.attentions.0.proj_in",)].producer == "mid_block.attentions.0.norm"
    assert not any("resnets" in reader or "proj_out" in reader for readers in points for reader in readers)


def test_folding_leaves_the_function_unchanged_and_moves_every_layer() -> None:
    unet = tiny_unet()
    points = find_fold_points(unet, find_sites(unet, 4, "w8a8"))
    folded = fold_factors(unet, random_factors(unet, points))
    for point in points:
        for reader in point.readers:
            assert not torch.allclose(
                folded.get_parameter(f"{reader}.weight"), unet.get_parameter(f"{reader}.weight"), rtol=0.1
            )
    with torch.no_grad():
        wanted = StepDenoiser(tiny_unet(), TIMESTEPS)(*inputs())
        found = StepDenoiser(folded, TIMESTEPS)(*inputs())
    error = torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)
    assert float(error) < 1e-5


def test_a_folded_input_is_the_input_over_its_factors() -> None:
    unet = tiny_unet()
    points = find_fold_points(unet, find_sites(unet, 4, "w8a8"))
    factors = random_factors(unet, points)
    seen: list[dict[str, Tensor]] = []
    for model in (unet, fold_factors(unet, factors)):
        caught: dict[str, Tensor] = {}
        for point in points:
            model.get_submodule(point.readers[0]).register_forward_pre_hook(
                lambda _, args, name=point.readers[0], to=caught: to.update({name: args[0]})
            )
        with torch.no_grad():
            StepDenoiser(model, TIMESTEPS)(*inputs())
        seen.append(caught)
    for point in points:
        plain, divided = (caught[point.readers[0]] for caught in seen)
        factor = factors[point].reshape(-1, 1, 1) if plain.ndim == 4 else factors[point]
        assert torch.allclose(divided * factor, plain, atol=1e-4 * float(plain.abs().max()))


def test_smoothquant_balances_as_its_equation_says() -> None:
    unet = tiny_unet()
    point = FoldPoint(tuple(f"{BLOCK}.attn1.{layer}" for layer in ("to_q", "to_k", "to_v")), f"{BLOCK}.norm1")
    largest = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    largest[5] = 0.0
    heights = torch.stack([unet.get_parameter(f"{reader}.weight").abs().amax(dim=0) for reader in point.readers])
    factor = smoothquant_factors(unet, [point], {point: largest}, 0.5)[point]
    assert float(factor[5]) == 1.0
    rest = torch.arange(64) != 5
    assert torch.allclose(factor[rest], (largest / heights.amax(dim=0)).sqrt()[rest])
    # At one half, inputs and weights are left with the same ranges.
    assert torch.allclose((largest / factor)[rest], (heights.amax(dim=0) * factor)[rest])
    even = smoothquant_factors(unet, [point], {point: largest}, 1.0)[point]
    assert torch.allclose((largest / even)[rest], torch.ones(63))


@pytest.fixture
def outliers() -> tuple[Tensor, Tensor, WeightSite]:
    """Inputs with a few large channels, a weight, and its site in blocks of 16."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(400, 64, generator=generator) * torch.where(torch.arange(64) % 13 == 0, 20.0, 0.5)
    return (
        x,
        torch.randn(24, 64, generator=generator),
        WeightSite(layer="layer", op="linear", format=INT4.in_blocks(16)),
    )


def test_errors_are_those_of_the_outputs(outliers: tuple[Tensor, Tensor, WeightSite]) -> None:
    x, weight, _ = outliers
    difference = 0.1 * torch.randn_like(weight)
    wanted = (x @ difference.T).square().sum(dim=0)
    assert torch.allclose(output_error(difference, x.T @ x), wanted, rtol=1e-3)


def test_awq_lowers_the_outputs_error(outliers: tuple[Tensor, Tensor, WeightSite]) -> None:
    x, weight, site = outliers
    layer = nn.Linear(64, 24, bias=False)
    layer.weight = nn.Parameter(weight)
    holder = nn.ModuleDict({"layer": layer})
    seen = ChannelStatistics(torch.zeros(64), torch.zeros(64), 0, torch.zeros(64, 64))
    seen.add(x)
    factor = awq_factors(holder, FoldPoint(("layer",), "norm"), {"layer": site}, seen, 20)
    assert not torch.equal(factor, torch.ones(64))

    def error(weight: Tensor, scale: Tensor, x: Tensor) -> float:
        rounded = dequantize_weight(quantize_weight(weight, scale, site), scale, site)
        return float((x @ (rounded - weight).T).square().sum())

    plain = clipped_scale(weight, site, x.T @ x)
    scaled = clipped_scale(weight * factor, site, (x / factor).T @ (x / factor))
    searched = search_weight_scale(weight, INT4.in_blocks(16))
    assert error(weight * factor, scaled, x / factor) < error(weight, plain, x)
    # Its blocks are judged one by one; summed, the inputs of the blocks being independent, it still pays.
    assert error(weight, plain, x) < error(weight, searched, x)
