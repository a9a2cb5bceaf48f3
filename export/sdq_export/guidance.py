"""Guidance over a step denoiser in torch: an image's rows in one call, and their combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdq_engines.guidance import Guidance
from sdq_export.conditioning import Conditioning

__all__ = ["GuidedDenoiser", "ModelOutputs", "combine", "predict_outputs"]


class ModelOutputs(NamedTuple):
    """The model's outputs for the prompt and, where guidance reads it, for the negative prompt: [B, C, h, w] each."""

    conditional: Tensor
    unconditional: Tensor | None

    def detach(self) -> ModelOutputs:
        """The same values without gradients."""
        return ModelOutputs(
            self.conditional.detach(), None if self.unconditional is None else self.unconditional.detach()
        )


def predict_outputs(
    denoiser: nn.Module,
    latents: Tensor,
    steps: Tensor,
    conditioning: Conditioning,
    negative: Conditioning | None,
    extra: Tensor | None = None,
) -> ModelOutputs:
    """Run the denoiser once over all rows, the negative prompts first, as diffusers does.

    Args:
        denoiser: takes (latents, steps, conditioning), and `extra` where there is one.
        latents: [B, C, h, w].
        steps: int64 [B].
        conditioning: of B prompts.
        negative: of B prompts, or of one for all; None to run the prompts alone.
        extra: [B, 1 + C, h, w], mask and masked image of an inpainting denoiser.
    """
    if negative is None:
        return ModelOutputs(denoiser(latents, steps, conditioning, *([] if extra is None else [extra])), None)
    rest = negative if len(negative) == len(conditioning) else negative.expand(len(conditioning))
    both = Conditioning.cat([rest, conditioning])
    more = [] if extra is None else [torch.cat([extra, extra])]
    predicted = denoiser(torch.cat([latents, latents]), torch.cat([steps, steps]), both, *more)
    unconditional, conditional = predicted.chunk(2)
    return ModelOutputs(conditional, unconditional)


def combine(outputs: ModelOutputs, guidance: Guidance) -> Tensor:
    """What the sampler is given, [B, C, h, w]: unconditional + scale * (conditional - unconditional), or the
    conditional output where that is the only one."""
    if outputs.unconditional is None:
        return outputs.conditional
    return outputs.unconditional + guidance.scale * (outputs.conditional - outputs.unconditional)


class GuidedDenoiser:
    """A step denoiser under guidance, for one batch of prompts: what a sampler's loop calls.

    It computes where the denoiser is, and answers where the latents are.

    Args:
        denoiser: takes (latents, steps, conditioning), e.g. a StepDenoiser.
        guidance: says whether the negative prompt is run.
        conditioning: of B prompts.
        negative: of B prompts or of one for all; None only where the guidance has no row for it.
        extra: [B, 1 + C, h, w], mask and masked image of an inpainting denoiser.
        on_outputs: hears every row's output, before they are combined.
    """

    def __init__(
        self,
        denoiser: Any,
        guidance: Guidance,
        conditioning: Conditioning,
        negative: Conditioning | None,
        *,
        extra: Tensor | None = None,
        on_outputs: Callable[[ModelOutputs], object] | None = None,
    ) -> None:
        self.denoiser, self.guidance, self.on_outputs = denoiser, guidance, on_outputs
        self.device = _device(denoiser)
        self.conditioning = conditioning.to(self.device)
        self.negative = None
        if "negative" in guidance.texts:
            if negative is None:
                raise ValueError(f"{guidance} reads a negative prompt, and there is none")
            self.negative = negative.to(self.device)
        self.extra = None if extra is None else extra.to(self.device)

    @torch.no_grad()
    def __call__(self, model_input: Tensor, step: int) -> Tensor:
        """The guided output [B, C, h, w], FP32, of the model's input [B, C, h, w] at a step."""
        steps = torch.full((len(model_input),), step, device=self.device)
        given = model_input.to(self.device)
        outputs = predict_outputs(self.denoiser, given, steps, self.conditioning, self.negative, self.extra)
        if self.on_outputs is not None:
            self.on_outputs(outputs)
        return combine(outputs, self.guidance).to(model_input.device, torch.float32)


def _device(denoiser: Any) -> torch.device:
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))
