"""`run_sampler`: the sampling loop of a compiled plan in torch, for training, evaluation and tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor

from sdq_export.sampler.plan import SamplerPlan

__all__ = ["run_sampler"]

Predict = Callable[[torch.Tensor, int], torch.Tensor]
OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]
OnLatents = Callable[[int, torch.Tensor], None]


def run_sampler(
    plan: SamplerPlan,
    predict: Predict,
    noise: torch.Tensor,
    *,
    start: int = 0,
    clean_latents: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> torch.Tensor:
    """Sample latents with ``plan``, from step ``start`` to its end.

    Args:
        plan: a compiled scheduler.
        predict: ``predict(model_input [B, C, h, w], step) -> guided model output [B, C, h, w]``; ``step`` counts the
            model calls of a full run, so it begins at ``start``.
        noise: unit Gaussian noise, float32 [B, C, h, w].
        start: the first step to run; img2img with strength below 1 begins later than 0.
        clean_latents: float32 [B, C, h, w], scaled as the model sees them; given, the run starts from these with the
            step's share of ``noise`` added (img2img), otherwise from noise alone.
        generator: draws the fresh noise of stochastic samplers, one for the batch or one per sample, in diffusers'
            order.
        on_step: called after each model call with (step, model_input, model output).
        on_latents: called after each step with (step, the latents that it left).

    Returns:
        The final latents, float32 [B, C, h, w], on the device of ``noise``.
    """
    noise = noise.to(torch.float32)
    latents = _initial_latents(plan, noise, start, clean_latents)
    state = torch.zeros(plan.slots, *latents.shape, device=latents.device)
    state[0] = latents
    rows = torch.from_numpy(plan.coefficients[start]).to(latents.device)
    slots = plan.slots
    for step in range(start, plan.calls):
        matrix, add_output, add_noise, u = rows[step].split([slots * slots, slots, slots, slots])
        model_input = torch.tensordot(u, state, dims=1)
        output = predict(model_input, step).to(torch.float32)
        if on_step is not None:
            on_step(step, model_input, output)
        state = torch.tensordot(matrix.reshape(slots, slots), state, dims=1) + _outer(add_output, output)
        if bool(add_noise.any()):
            state = state + _outer(add_noise, _fresh_noise(output, generator))
        if on_latents is not None:
            on_latents(step, state[0])
    return state[0]


def _initial_latents(
    plan: SamplerPlan, noise: torch.Tensor, start: int, clean_latents: torch.Tensor | None
) -> torch.Tensor:
    if clean_latents is None:
        return float(plan.init_noise_sigma[start]) * noise
    keep, add = (float(value) for value in plan.noising[start])
    return keep * clean_latents.to(noise) + add * noise


def _outer(weights: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """[S] and [B, C, h, w] to [S, B, C, h, w]."""
    return weights.reshape(-1, *[1] * sample.ndim) * sample


def _fresh_noise(like: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    chosen = list(generator) if isinstance(generator, Sequence) else generator
    drawn: torch.Tensor = randn_tensor(like.shape, generator=chosen, device=like.device, dtype=torch.float32)
    return drawn
