"""Which tensors are quantized: an explicit list, checked against the UNet's own layers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from torch import nn

from sdq_engines.formats import INT4, INT8
from sdq_export.quantspec import ActivationSite, QuantSpec, WeightSite
from sdq_export.sites import find_sites, step_groups
from tests.tiny import tiny_unet


def test_every_layer_but_the_time_path_the_prologue_and_the_ends() -> None:
    unet = tiny_unet()
    spec = find_sites(unet, 4, "w4a8")
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    left_out = layers - set(spec.weight_sites)
    assert all(
        "time_emb" in x or "attn2.to_k" in x or "attn2.to_v" in x or x in ("conv_in", "conv_out") for x in left_out
    )
    assert not any("time_emb" in x or "attn2.to_k" in x or "attn2.to_v" in x for x in spec.weight_sites)
    assert {site.format for site in spec.weights} == {INT4}


def test_query_key_and_value_share_one_site() -> None:
    spec = find_sites(tiny_unet(), 4, "w8a8")
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    site = spec.activation_of[f"{attention}.to_v"]
    assert site.name == f"{attention}.to_q.input"
    assert site.consumers == tuple(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v"))
    cross = spec.activation_of["mid_block.attentions.0.transformer_blocks.0.attn2.to_q"]
    assert cross.consumers == ("mid_block.attentions.0.transformer_blocks.0.attn2.to_q",)


def test_a_kept_layer_leaves_the_others_of_its_site() -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    spec = find_sites(tiny_unet(), 4, "w8a8", keep=("conv_in", "conv_out", "*attn1.to_q"))
    assert spec.activation_of[f"{attention}.to_v"].consumers == (f"{attention}.to_k", f"{attention}.to_v")
    assert f"{attention}.to_q" not in spec.weight_sites


def test_w4a16_has_blocks_in_linear_and_int8_in_conv() -> None:
    spec = find_sites(tiny_unet(), 4, "w4a16", block_size=64)
    for site in spec.weights:
        assert (site.format.bits, site.format.block_size is None) == ((4, False) if site.op == "linear" else (8, True))
        assert (site.layer in spec.activation_of) == (site.op == "conv")
    # The tiny UNet is 32 wide where 64 does not divide: the block is halved, not dropped.
    assert {site.format.block_size for site in spec.weights if site.op == "linear"} == {32, 64}


def test_bits_by_glob_the_last_one_decides() -> None:
    spec = find_sites(tiny_unet(), 4, "w4a8", bits={"mid_block.*": 8, "*.resnets.0.conv1": 4})
    sites = spec.weight_sites
    assert sites["mid_block.resnets.0.conv2"].format.bits == 8
    assert sites["mid_block.resnets.0.conv1"].format.bits == 4


@pytest.mark.parametrize(
    ("steps", "groups", "wanted"), [(4, None, (0, 1, 2, 3)), (5, 2, (0, 0, 0, 1, 1)), (3, 9, (0, 1, 2))]
)
def test_groups(steps: int, groups: int | None, wanted: tuple[int, ...]) -> None:
    assert step_groups(steps, groups) == wanted


def test_more_than_fifty_steps_share() -> None:
    groups = step_groups(120, None)
    assert groups[-1] == 49
    assert sorted(set(groups)) == list(range(50))


def test_a_spec_that_contradicts_itself_is_refused() -> None:
    weight = WeightSite(layer="a", op="linear", format=INT8)
    activation = ActivationSite(name="a.input", consumers=("a",), groups=(0, 1))
    with pytest.raises(ValidationError, match="groups for 2 steps, 3 are wanted"):
        QuantSpec(precision="w8a8", num_steps=3, weights=(weight,), activations=(activation,))
    with pytest.raises(ValidationError, match="no weight site"):
        QuantSpec(precision="w8a8", num_steps=2, weights=(), activations=(activation,))
    with pytest.raises(ValidationError, match="rise by 0 or 1"):
        ActivationSite(name="a.input", consumers=("a",), groups=(0, 2))
