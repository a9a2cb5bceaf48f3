"""Blocks by themselves compute what they compute in the denoiser."""

from __future__ import annotations

import torch

from sdq_deploy.training.methods.blocks import (
    Block,
    Samples,
    block_inputs,
    block_outputs,
    find_blocks,
)
from sdq_export.sites import find_sites
from sdq_export.stepping import StepDenoiser
from tests.deploy.training.test_modelopt_backend import TIMESTEPS, inputs
from tests.tiny import tiny_unet


def teacher() -> StepDenoiser:
    return StepDenoiser(tiny_unet(), TIMESTEPS).eval().requires_grad_(False)


def blocks() -> list[Block]:
    return find_blocks(teacher(), find_sites(tiny_unet(), 4, "w4a8"), Samples(*inputs()))


def test_every_site_is_in_one_block_in_the_order_of_the_forward() -> None:
    spec = find_sites(tiny_unet(), 4, "w4a8")
    found = blocks()
    layers = [layer for block in found for layer in block.layers]
    assert sorted(layers) == sorted(site.layer for site in spec.weights)
    names = [name for block in found for name in block.activations]
    assert sorted(names) == sorted(site.name for site in spec.activations)
    order = [block.name for block in found]
    assert order[:3] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "down_blocks.0.downsamplers.0.conv"]
    assert (
        order.index("mid_block.attentions.0")
        < order.index("mid_block.resnets.1")
        < order.index("up_blocks.0.resnets.0")
    )


def test_a_block_alone_gives_what_it_gives_in_the_denoiser() -> None:
    denoiser, samples = teacher(), Samples(*inputs())
    for block in blocks():
        caught: list[torch.Tensor] = []
        handle = denoiser.model.get_submodule(block.name).register_forward_hook(
            lambda _, __, output, to=caught: to.append(output[0] if isinstance(output, tuple) else output)
        )
        denoiser(*inputs())
        handle.remove()
        found = block_outputs(denoiser, block, block_inputs(denoiser, block, samples))
        assert torch.allclose(found, caught[0], atol=1e-5), block.name
