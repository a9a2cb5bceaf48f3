"""The step denoiser equals the UNet it was made of; the steps survive checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_export.conditioning import TEXT_INPUT, Conditioning
from sdq_export.stepping import StepDenoiser
from tests.nearness import FLOAT_NOISE, relative
from tests.tiny import WIDTH, prompt_rows, tiny_unet

TIMESTEPS = torch.tensor([981, 500, 501, 1])


def inputs(batch: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    text = prompt_rows(torch.randn(batch, 5, WIDTH, generator=generator))
    return latents, torch.tensor([2, 0, 3, 1])[:batch], text


def test_equals_the_unet_at_mixed_steps() -> None:
    unet = tiny_unet()
    denoiser = StepDenoiser(copy.deepcopy(unet), TIMESTEPS)
    latents, steps, text = inputs()
    with torch.no_grad():
        wanted = unet(latents, TIMESTEPS[steps], text.tensors[TEXT_INPUT]).sample
        assert relative(denoiser(latents, steps, text), wanted) <= FLOAT_NOISE
    # The rows really differ by step: the same call with other steps is another answer.
    with torch.no_grad():
        assert not torch.allclose(denoiser(latents, steps.flip(0), text), wanted, atol=1e-3)


def test_a_scalar_step_is_the_whole_batch() -> None:
    denoiser = StepDenoiser(tiny_unet(), TIMESTEPS)
    latents, _, text = inputs()
    with torch.no_grad():
        assert torch.equal(denoiser(latents, torch.tensor(2), text), denoiser(latents, torch.full((4,), 2), text))


def test_no_time_layer_is_left() -> None:
    denoiser = StepDenoiser(tiny_unet(), TIMESTEPS)
    left = [name for name, _ in denoiser.named_parameters() if "time_" in name]
    assert left == []


def test_checkpointing_recomputes_with_the_steps_of_its_own_forward() -> None:
    """A second forward with other steps comes between forward and backward; the gradients must not notice."""
    latents, steps, text = inputs(2)
    gradients = []
    for checkpointed in (False, True):
        denoiser = StepDenoiser(tiny_unet().requires_grad_(True), TIMESTEPS).train()
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        loss = denoiser(latents, steps, text).square().mean()
        denoiser(latents, steps.flip(0), text)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 100
    assert max(relative(a, b) for a, b in zip(*gradients, strict=True)) <= FLOAT_NOISE


def test_the_step_is_unknown_outside_a_call() -> None:
    denoiser = StepDenoiser(tiny_unet(), TIMESTEPS)
    with pytest.raises(RuntimeError, match="only inside a call"):
        _ = denoiser.state.steps


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
    ],
)
def test_other_time_paths_are_refused_by_name(change: dict[str, str], named: str) -> None:
    config = {key: value for key, value in tiny_unet().config.items() if not key.startswith("_")} | change
    with pytest.raises(SdqError, match=named):
        StepDenoiser(UNet2DConditionModel.from_config(config), TIMESTEPS)
