"""Guidance over a denoiser in torch, beside diffusers' own guider."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from sdq_engines.guidance import Guidance
from sdq_export.conditioning import TEXT_INPUT, Conditioning
from sdq_export.guidance import GuidedDenoiser, ModelOutputs, combine

PROMPTS = Conditioning({TEXT_INPUT: torch.tensor([1.0, 2.0]).reshape(2, 1, 1)})
EMPTY = Conditioning({TEXT_INPUT: torch.zeros(1, 1, 1)})


class Rows:
    """A denoiser that answers latents + step + what it was told, and counts its rows."""

    rows = 0

    def __call__(self, latents: Tensor, steps: Tensor, conditioning: Conditioning, *extra: Tensor) -> Tensor:
        self.rows += len(latents)
        told = conditioning.tensors[TEXT_INPUT].reshape(-1, 1, 1, 1) + sum(each.mean() for each in extra)
        return latents + steps.reshape(-1, 1, 1, 1) + told


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 7.5])
def test_it_combines_as_diffusers_guider_does(scale: float) -> None:
    outputs = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guidance = Guidance.classifier_free(scale)
    guider = ClassifierFreeGuidance(guidance_scale=scale)
    wanted = guider.forward(outputs[0], outputs[1]).pred if scale > 1 else outputs[0]
    found = combine(ModelOutputs(outputs[0], outputs[1] if guidance.rows == 2 else None), guidance)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (3.0, 4)])
def test_a_denoiser_runs_the_rows_of_its_guidance(scale: float, rows: int) -> None:
    denoiser, heard = Rows(), list[ModelOutputs]()
    guided = GuidedDenoiser(denoiser, Guidance.classifier_free(scale), PROMPTS, EMPTY, on_outputs=heard.append)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    found = guided(latents, 5)
    assert denoiser.rows == rows
    torch.testing.assert_close(found, latents + 5 + scale * PROMPTS.tensors[TEXT_INPUT].reshape(2, 1, 1, 1))
    assert (heard[0].unconditional is None) == (scale == 1)


def test_negative_prompts_of_each_image_and_extra_channels() -> None:
    denoiser = Rows()
    negative = Conditioning({TEXT_INPUT: torch.tensor([-1.0, -2.0]).reshape(2, 1, 1)})
    extra = torch.full((2, 5, 8, 8), 10.0)
    guided = GuidedDenoiser(denoiser, Guidance.classifier_free(2.0), PROMPTS, negative, extra=extra)
    found = guided(torch.zeros(2, 4, 8, 8), 0)
    # negative + 2 (prompt - negative), and the extra channels in both
    assert found[:, 0, 0, 0].tolist() == [-1 + 2 * 2 + 10, -2 + 2 * 4 + 10]


def test_a_negative_prompt_that_is_read_must_be_there() -> None:
    guided = GuidedDenoiser(Rows(), Guidance.classifier_free(1.0), PROMPTS, None)
    torch.testing.assert_close(guided(torch.zeros(2, 4, 8, 8), 0)[:, 0, 0, 0], torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="reads a negative prompt"):
        GuidedDenoiser(Rows(), Guidance.classifier_free(2.0), PROMPTS, None)
