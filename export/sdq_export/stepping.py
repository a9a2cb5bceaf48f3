"""The denoiser as a function of the step: time information precalculated, the step passed explicitly.

Time information precalculation (TIP; Li et al., "Efficiency Meets Fidelity"): the time path of the denoiser depends on
the timestep alone, so its T values are computed once in FP32 and looked up by the step, in training and at inference.
The step travels in a `StepState` that the wrapper sets for each call: nothing counts calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdq_engines.errors import SdqError
from sdq_export.inpainting import with_extra

__all__ = ["StepDenoiser", "StepState", "TimeTable", "check_time_path", "time_tables"]


class StepState:
    """The steps of the samples that are passing through the denoiser: int64 [B], one a sample."""

    def __init__(self) -> None:
        self._steps: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """The batch's steps, int64 [B].

        Raises:
            RuntimeError: no call of the denoiser is under way.
        """
        if self._steps is None:
            raise RuntimeError("the step is known only inside a call of StepDenoiser")
        return self._steps

    @contextlib.contextmanager
    def during(self, steps: Tensor) -> Iterator[None]:
        """Set the steps for the block, and restore what was there before."""
        before, self._steps = self._steps, steps
        try:
            yield
        finally:
            self._steps = before

    def checkpointing(self) -> Callable[..., Any]:
        """A gradient checkpointing function that restores the steps of the forward when it recomputes.

        The recompute runs in the backward, when another forward may have set other steps, or none is set; a plain
        checkpoint would then look up the wrong rows without a word.
        """

        def run(module: nn.Module, *args: Any) -> Any:
            steps = self.steps

            def forward(*inputs: Any) -> Any:
                with self.during(steps):
                    return module(*inputs)

            return checkpoint(forward, *args, use_reentrant=False)

        return run


class TimeTable(nn.Module):
    """Stands where a ResNet block had `time_emb_proj`: row `step` of a table in place of a projection.

    Args:
        table: FP32 [T, C], row t is `time_emb_proj(silu(emb_t))`.
        state: holds the batch's steps.
    """

    table: Tensor

    def __init__(self, table: Tensor, state: StepState) -> None:
        super().__init__()
        self.state = state
        self.register_buffer("table", table.detach().to(torch.float32), persistent=False)

    def forward(self, temb: Tensor) -> Tensor:
        """Rows [B, C] of the batch's steps; `temb` is not read."""
        return self.table[self.state.steps]


class _NoTimeProjection(nn.Module):
    def forward(self, timesteps: Tensor) -> Tensor:
        return timesteps.reshape(-1, 1)


class _NoTimeEmbedding(nn.Module):
    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        return sample


def check_time_path(unet: nn.Module) -> None:
    """Refuse, by name, a UNet whose time path is more than a function of the timestep added to the ResNet blocks.

    Raises:
        SdqError: class or image embeddings, SDXL's added conditions, or another time embedding norm than "default".
    """
    config: Any = unet.config
    for key in (
        "class_embed_type",
        "addition_embed_type",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
        "num_class_embeds",
    ):
        if getattr(config, key, None) is not None:
            raise SdqError(
                f"The denoiser's {key}={getattr(config, key)!r} mixes a condition into the time path, "
                "which this version does not support.",
                "Supported are UNets whose time path depends on the timestep alone, as in Stable Diffusion 1 and 2.",
            )
    for name, module in unet.named_modules():
        kind = getattr(module, "time_embedding_norm", "default")
        if kind != "default":
            raise SdqError(f"The block {name} has time_embedding_norm={kind!r}; only 'default' is supported.")


@torch.no_grad()
def time_tables(unet: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
    """Evaluate the time path for each step in FP32.

    Args:
        unet: a diffusers UNet2DConditionModel with its time path in place.
        timesteps: [T], the value that the model is given at each step.

    Returns:
        Path of each ResNet block -> FP32 [T, C], `time_emb_proj(silu(emb_t))`; conv1's bias is not in it.

    Raises:
        SdqError: the time path is of a form that is not supported.
    """
    check_time_path(unet)
    model: Any = unet
    with torch.autocast(device_type=timesteps.device.type, enabled=False):
        embedding = model.time_embedding(model.time_proj(timesteps).float())
        if model.time_embed_act is not None:
            embedding = model.time_embed_act(embedding)
        return {
            name: block.time_emb_proj(block.nonlinearity(embedding)).float()
            for name, block in model.named_modules()
            if getattr(block, "time_emb_proj", None) is not None
        }


class StepDenoiser(nn.Module):
    """A UNet called by step: its time path is replaced by tables, the batch's steps go with every call.

    It takes `unet` over and changes it in place; the caller hands in a copy if the original is still wanted.

    Args:
        unet: a diffusers UNet2DConditionModel.
        timesteps: [T], the timestep of each step.
    """

    def __init__(self, unet: nn.Module, timesteps: Tensor) -> None:
        super().__init__()
        self.state = StepState()
        tables = time_tables(unet, timesteps)
        for path, table in tables.items():
            unet.get_submodule(path).time_emb_proj = TimeTable(table, self.state)
        model: Any = unet
        model.time_proj, model.time_embedding, model.time_embed_act = _NoTimeProjection(), _NoTimeEmbedding(), None
        self.unet = model
        self.num_steps = len(timesteps)

    def forward(
        self, latents: Tensor, steps: Tensor, text_embeddings: Tensor, extra_channels: Tensor | None = None
    ) -> Tensor:
        """Predict the model output.

        Args:
            latents: [B, C, h, w], scaled as the scheduler wants its model input.
            steps: int64 [B] (or a scalar for the whole batch), index of the model call in 0..T-1.
            text_embeddings: [B, L, D].
            extra_channels: [B, 1 + C, h, w], mask and masked image of an inpainting UNet; without them the whole image
                is masked, which is what training and evaluation see (docs/quantization.md, "Inpainting").

        Returns:
            [B, C, h, w], epsilon or velocity as the checkpoint was trained.
        """
        steps = steps.expand(latents.shape[0]) if steps.ndim == 0 else steps
        latents = with_extra(self.unet, latents, extra_channels)
        with self.state.during(steps):
            output: Tensor = self.unet(latents, steps, text_embeddings, return_dict=False)[0]
        return output

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward, each with the steps of its own forward."""
        self.unet.enable_gradient_checkpointing(self.state.checkpointing())
