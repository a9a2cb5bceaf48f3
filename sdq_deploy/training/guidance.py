"""Classifier-free guidance over a step denoiser: both model outputs in one call, and their combination."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdq_export.conditioning import Conditioning

__all__ = ["ModelOutputs", "guide", "predict_outputs"]


class ModelOutputs(NamedTuple):
    """The model's outputs for the prompt and, where guidance is on, for the empty prompt: [B, C, h, w] each."""

    conditional: Tensor
    unconditional: Tensor | None

    def detach(self) -> ModelOutputs:
        """The same values without gradients."""
        return ModelOutputs(
            self.conditional.detach(), None if self.unconditional is None else self.unconditional.detach()
        )


def predict_outputs(
    denoiser: nn.Module, latents: Tensor, steps: Tensor, conditioning: Conditioning, empty: Conditioning | None
) -> ModelOutputs:
    """Run the denoiser once over both halves, the empty prompt first, as diffusers does.

    Args:
        denoiser: takes (latents, steps, conditioning).
        latents: [B, C, h, w].
        steps: int64 [B].
        conditioning: of B prompts.
        empty: of the empty prompt alone; None to run the prompts alone.
    """
    if empty is None:
        return ModelOutputs(denoiser(latents, steps, conditioning), None)
    both = Conditioning.cat([empty.expand(len(conditioning)), conditioning])
    unconditional, conditional = denoiser(torch.cat([latents, latents]), torch.cat([steps, steps]), both).chunk(2)
    return ModelOutputs(conditional, unconditional)


def guide(outputs: ModelOutputs, guidance_scale: float) -> Tensor:
    """unconditional + guidance_scale * (conditional - unconditional); the conditional output where guidance is off."""
    if outputs.unconditional is None:
        return outputs.conditional
    return outputs.unconditional + guidance_scale * (outputs.conditional - outputs.unconditional)
