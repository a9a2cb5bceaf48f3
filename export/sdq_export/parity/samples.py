"""The inputs of parity: where the floating-point model's sampling goes, and what it answers there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_engines.guidance import Guidance
from sdq_export.conditioning import Conditioning
from sdq_export.guidance import GuidedDenoiser
from sdq_export.inpainting import sample_extra
from sdq_export.parity.budget import Gate
from sdq_export.sampler.jump import jump, model_input
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sampler.run import run_sampler
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser

__all__ = ["PARITY_PROMPTS", "TeacherSamples", "parity_prompts", "record_teacher"]

PARITY_PROMPTS = (
    "a red circle on a blue background",
    "a photo of an astronaut riding a horse on mars",
    "a bowl of fruit on a wooden table, oil painting",
    "a small house by the sea at sunset",
)
"""Used where an export is given no prompts of its own."""

_SEED = 2718


@dataclass(frozen=True)
class TeacherSamples:
    """The teacher's run for N samples, at the steps that the gate looks at.

    Attributes:
        conditioning: of 2N prompts, unconditional first.
        guidance: of the guided outputs; a graph always runs both halves, with its scale.
        model_inputs: step -> float32 [N, C, h, w], what the denoiser is given.
        outputs: step -> float32 [N, C, h, w], the teacher's guided output there.
        extra: float32 [N, 1 + C, h, w], mask and masked image of an inpainting denoiser, the same at every step.
    """

    conditioning: Conditioning
    guidance: Guidance
    model_inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    extra: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """The model's input at the last step, nearly an image's latents, float32 [1, C, h, w] of the first sample."""
        return self.model_inputs[max(self.model_inputs)][:1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, h, w."""
        count, channels, height, width = next(iter(self.model_inputs.values())).shape
        return count, channels, height, width

    def guided(self, denoiser: Any, extra: Tensor | None) -> GuidedDenoiser:
        """A denoiser told of the samples' prompts; `extra` as the field, of the size of what it will be given."""
        prompts, negative = self.conditioning[self.shape[0] :], self.conditioning[: self.shape[0]]
        return GuidedDenoiser(denoiser, self.guidance, prompts, negative, extra=extra)

    def distances(self, outputs: NDArray[np.float32] | Tensor, step: int) -> NDArray[np.float64]:
        """Relative L2 distance of each sample's guided output [N, C, h, w] from the teacher's, [N]."""
        found, wanted = torch.as_tensor(outputs).flatten(1), self.outputs[step].flatten(1)
        result: NDArray[np.float64] = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).double().numpy()
        return result


def parity_prompts(prompts: tuple[str, ...], count: int) -> list[str | None]:
    """What N samples are told: N times nothing, the unconditional half, then the prompts in turn."""
    return [*[None] * count, *(prompts[index % len(prompts)] for index in range(count))]


def record_teacher(
    source: Source,
    plan: SamplerPlan,
    guidance: Guidance,
    conditioning: Conditioning,
    gate: Gate,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda done: None,
) -> TeacherSamples:
    """Sample the gate's images with the floating-point model, and keep the steps that the gate looks at.

    A full gate keeps the whole run of the sampler. A gate of few calls calls the teacher at its own steps alone: what
    it answers at one says what the latents of the next are (`sdq_export.sampler.jump`). Both are inputs that lie on
    the way of a run, at the noise level that each step's scales and time row belong to; which of the images on that
    way they are does not matter to what is compared there, a graph with torch.

    Args:
        source: the checkpoint; its denoiser is not changed.
        plan: the sampler.
        guidance: of the package.
        conditioning: of `parity_prompts`.
        gate: steps and samples.
        device: where the teacher computes.
        on_step: hears how many steps are done.
    """
    latent_shape = source.family.latent_shape
    count = len(conditioning) // 2
    teacher = StepDenoiser(source.own(source.family.denoiser), torch.from_numpy(plan.timesteps)).eval().to(device)
    generator = torch.Generator().manual_seed(_SEED)
    extra = sample_extra(teacher.model, count, torch.Generator().manual_seed(_SEED + 1))
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def keep(step: int, given: Tensor, output: Tensor) -> None:
        inputs[step], outputs[step] = given.clone(), output.clone()
        on_step(len(inputs))

    guided = GuidedDenoiser(teacher, guidance, conditioning[count:], conditioning[:count], extra=extra)
    noise = torch.randn(count, *latent_shape, generator=generator)
    if gate.full:
        run_sampler(plan, guided, noise, generator=generator, on_step=keep)
    else:
        _jump_through(plan, guided, noise, gate.steps, keep)
    return TeacherSamples(conditioning, guidance, inputs, outputs, extra)


def _jump_through(
    plan: SamplerPlan,
    predict: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    steps: tuple[int, ...],
    keep: Callable[[int, Tensor, Tensor], None],
) -> None:
    latents = float(plan.init_noise_sigma[0]) * noise
    for step, later in zip(steps, (*steps[1:], None), strict=True):
        given = model_input(plan, latents, step)
        output = predict(given, step)
        keep(step, given, output)
        if later is not None:
            latents = jump(plan, latents, output, step, later)
