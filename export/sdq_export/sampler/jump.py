"""From one step of a run to a later one by a single model output, as a sampler of few steps goes.

A model's output at a step says, together with the latents, what the clean image and the noise in it are (DDIM's
prediction; Song et al., 2020, equation 12). The latents of any later step are the same two mixed as the scheduler
mixes them there, which is where an img2img run begins (`SamplerPlan.noising`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_export.sampler.plan import SamplerPlan

__all__ = ["clean_and_noise", "jump", "model_input"]


def model_input(plan: SamplerPlan, latents: Tensor, step: int) -> Tensor:
    """What the model is given where a run begins at this step with these latents."""
    return float(plan.step_map(step, step).u[0]) * latents


def jump(plan: SamplerPlan, latents: Tensor, output: Tensor, step: int, later: int) -> Tensor:
    """Latents of the step `later`, from those of `step` [B, C, h, w] and the model's output there."""
    clean, noise = clean_and_noise(plan, latents, output, step)
    keep, add = (float(value) for value in plan.noising[later])
    return keep * clean + add * noise


def clean_and_noise(plan: SamplerPlan, latents: Tensor, output: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The clean latents and the unit noise that the model sees in `latents` = a * clean + b * noise.

    Cases, by the scheduler's prediction type:
    1. a flow: output = noise - clean;
    2. epsilon: the noise;
    3. sample: the clean latents;
    4. v_prediction: (a * noise - b * clean) / sqrt(a^2 + b^2).

    Raises:
        SdqError: another prediction type.
    """
    a, b = (float(value) for value in plan.noising[step])
    kind = "flow" if plan.scheduler.startswith("FlowMatch") else plan.config.get("prediction_type", "epsilon")
    if kind == "flow":  # 1
        return (latents - b * output) / (a + b), (latents + a * output) / (a + b)
    if kind == "epsilon":  # 2
        return (latents - b * output) / a, output
    if kind in ("sample", "original_sample"):  # 3
        return output, (latents - a * output) / b
    if kind == "v_prediction":  # 4
        length = float(torch.tensor([a, b]).norm())
        return (a * latents / length - b * output) / length, (b * latents / length + a * output) / length
    raise SdqError(
        f"A gate of few calls does not know the prediction type {kind!r} of {plan.scheduler}.",
        "Look at every step: --gate full",
    )
