"""The denoiser as a function of the step: time information precalculated, the step passed explicitly.

Time information precalculation (TIP; Li et al., "Efficiency Meets Fidelity"): what the denoiser makes of the timestep
alone is computed once for the T steps in FP32 and looked up by the step, in training and at inference. The step
travels in a `StepState` that the wrapper sets for each call: nothing counts calls.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sdq_export.conditioning import Conditioning
from sdq_export.families import network_of
from sdq_export.inpainting import with_extra
from sdq_export.step_state import StepState
from sdq_export.time_path import FrozenLinear

__all__ = ["StepDenoiser"]


class StepDenoiser(nn.Module):
    """A denoiser called by step: its time path is replaced by tables, the batch's steps go with every call.

    It takes `model` over and changes it in place; the caller hands in a copy if the original is still wanted.

    Args:
        model: the denoiser of one of our families, e.g. diffusers' UNet2DConditionModel.
        timesteps: [T], the timestep of each step.

    Attributes:
        network: what kind of denoiser it is.
        tables: what the time path made of the timesteps, f32 [T, ...] by name.

    Raises:
        SdqError: the denoiser is none of our families', or its time path has a form that is not supported.
    """

    def __init__(self, model: nn.Module, timesteps: Tensor) -> None:
        super().__init__()
        self.network = network_of(model)
        self.state = StepState()
        self.tables = self.network.time_tables(model, timesteps)
        self.network.use_tables(model, self.tables, self.state)
        self.model: Any = model
        self.num_steps = len(timesteps)

    def forward(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, extra_channels: Tensor | None = None
    ) -> Tensor:
        """Predict the model output.

        Args:
            latents: [B, C, h, w], scaled as the scheduler wants its model input.
            steps: int64 [B] (or a scalar for the whole batch), index of the model call in 0..T-1.
            conditioning: of B prompts.
            extra_channels: [B, 1 + C, h, w], mask and masked image of an inpainting denoiser; without them the whole
                image is masked, which is what training and evaluation see (docs/quantization.md, "Inpainting").

        Returns:
            [B, C, h, w], epsilon or velocity as the checkpoint was trained.
        """
        steps = steps.expand(latents.shape[0]) if steps.ndim == 0 else steps
        latents = with_extra(self.model, latents, extra_channels)
        with self.state.during(steps):
            return self.network.predict(self.model, latents, steps, conditioning)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward, each with the steps of its own forward."""
        self.model.enable_gradient_checkpointing(self.state.checkpointing())

    @property
    def prologue_layers(self) -> list[str]:
        """Paths of the linear layers that a package computes once per prompt: those that are not left to quantize."""
        every_step = self.network.quantizable_layers(self.model)
        layers = ((path, part) for path, part in self.model.named_modules() if path not in every_step)
        return [path for path, part in layers if isinstance(part, nn.Linear | FrozenLinear)]
