"""The inputs of parity: where the floating-point model's own sampling goes, and what it answers there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdq_export.conditioning import Conditioning
from sdq_export.inpainting import sample_extra
from sdq_export.sampler.plan import SamplerPlan
from sdq_export.sampler.run import run_sampler
from sdq_export.source import Source
from sdq_export.stepping import StepDenoiser

__all__ = ["PARITY_PROMPTS", "TeacherSamples", "guided", "record_teacher", "samples_for"]

PARITY_PROMPTS = (
    "a red circle on a blue background",
    "a photo of an astronaut riding a horse on mars",
    "a bowl of fruit on a wooden table, oil painting",
    "a small house by the sea at sunset",
)
"""Used where an export is given no prompts of its own."""

_WANTED_ELEMENTS = 2048
_SEED = 2718


@dataclass(frozen=True)
class TeacherSamples:
    """The teacher's trajectory for N samples.

    Attributes:
        conditioning: of 2N prompts, unconditional first.
        guidance_scale: of the guided outputs.
        model_inputs: float32 [T, N, C, h, w], what the denoiser is given at each step.
        outputs: float32 [T, N, C, h, w], the teacher's guided output there.
        extra: float32 [N, 1 + C, h, w], mask and masked image of an inpainting denoiser, the same at every step.
    """

    conditioning: Conditioning
    guidance_scale: float
    model_inputs: Tensor
    outputs: Tensor
    extra: Tensor | None = None

    def first(self) -> TeacherSamples:
        """The first sample alone."""
        rows = [0, len(self.conditioning) // 2]
        extra = None if self.extra is None else self.extra[:1]
        return TeacherSamples(
            self.conditioning[rows], self.guidance_scale, self.model_inputs[:, :1], self.outputs[:, :1], extra
        )

    def distances(self, outputs: NDArray[np.float32] | Tensor, step: int) -> NDArray[np.float64]:
        """Relative L2 distance of each sample's guided output [N, C, h, w] from the teacher's, [N]."""
        found, wanted = torch.as_tensor(outputs).flatten(1), self.outputs[step].flatten(1)
        result: NDArray[np.float64] = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).double().numpy()
        return result


def samples_for(latent_shape: tuple[int, int, int]) -> int:
    """N: enough samples that their average is steady; small latents need more of them."""
    return max(2, min(8, _WANTED_ELEMENTS // int(np.prod(latent_shape))))


def guided(denoiser: Callable[..., Tensor], samples_in: Tensor, step: int, conditioning: Conditioning,
           guidance_scale: float, extra: Tensor | None = None) -> Tensor:  # fmt: skip
    """One guided output [N, C, h, w] of a StepDenoiser, as diffusers' pipelines combine it."""
    more = [] if extra is None else [torch.cat([extra, extra])]
    with torch.no_grad():
        output = denoiser(torch.cat([samples_in, samples_in]), torch.tensor(step), conditioning, *more)
    uncond, cond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def record_teacher(
    source: Source,
    plan: SamplerPlan,
    guidance_scale: float,
    prompts: Sequence[str] = PARITY_PROMPTS,
    on_step: Callable[[int], None] | None = None,
) -> TeacherSamples:
    """Sample N images' latents with the floating-point model and keep every step.

    Args:
        source: the checkpoint; its denoiser is not changed.
        plan: the sampler.
        guidance_scale: of classifier-free guidance.
        prompts: as many as there are are used in turn.
        on_step: hears each finished step.
    """
    latent_shape = source.family.latent_shape(source)
    count = samples_for(latent_shape)
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    conditioning = source.family.encode_prompts(source, [*[None] * count, *chosen])
    for encoder in source.family.text_encoders:  # gigabytes, which are not needed beside the denoiser
        source.release(encoder.component)
    teacher = StepDenoiser(source.own(source.family.denoiser), torch.from_numpy(plan.timesteps)).eval()
    generator = torch.Generator().manual_seed(_SEED)
    extra = sample_extra(teacher.model, count, torch.Generator().manual_seed(_SEED + 1))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(step: int, model_input: Tensor, output: Tensor) -> None:
        inputs.append(model_input.clone())
        outputs.append(output.clone())
        if on_step is not None:
            on_step(step)

    run_sampler(
        plan,
        lambda model_input, step: guided(teacher, model_input, step, conditioning, guidance_scale, extra),
        torch.randn(count, *latent_shape, generator=generator),
        generator=generator,
        on_step=keep,
    )
    return TeacherSamples(conditioning, guidance_scale, torch.stack(inputs), torch.stack(outputs), extra)
