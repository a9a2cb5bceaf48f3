"""The MMDiT of Stable Diffusion 3: adaptive normalization, and texts of up to three encoders joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_export.capture import FreeSize, capture
from sdq_export.conditioning import POOLED_INPUT, TEXT_INPUT, Conditioning
from sdq_export.families.network import GraphCuts, Network
from sdq_export.passes.modulation import CutModulation, KeepModulation
from sdq_export.sizes import HEIGHT, WIDTH, different
from sdq_export.step_state import StepState
from sdq_export.time_path import FrozenLinear, freeze_linears_

__all__ = ["T5_INPUT", "T5_TOKENS", "MMDiT"]

T5_INPUT = "t5_embeddings"
"""The conditioning tensor [n, 256, D] of the third text encoder."""

T5_TOKENS = 256
"""Tokens of the T5 part of the text, diffusers' default `max_sequence_length`; zeros where there is no T5."""

_TIME = "time_text_embed"
_CONTEXT = "context_embedder"
_QUERY_KEY_VALUE = {"to_q": "input", "to_k": "input", "to_v": "input"} | dict.fromkeys(
    ("add_q_proj", "add_k_proj", "add_v_proj"), "context"
)


class MMDiT(Network):
    """diffusers' SD3Transformer2DModel.

    Args:
        has_t5: whether its graph takes the texts of a third encoder; diffusers puts zeros in their place.
    """

    blocks = ("JointTransformerBlock",)

    def __init__(self, has_t5: bool = False) -> None:
        self.has_t5 = has_t5

    def owns(self, denoiser: nn.Module) -> bool:
        from diffusers import SD3Transformer2DModel

        return isinstance(denoiser, SD3Transformer2DModel)

    def latent_multiple(self, denoiser: nn.Module) -> int:
        config: Any = denoiser.config
        return int(config.patch_size)

    def latent_limit(self, denoiser: nn.Module) -> int:
        """What the position table has rows for; smaller latents take its middle."""
        config: Any = denoiser.config
        return int(config.pos_embed_max_size * config.patch_size)

    def predict(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return _call(denoiser, latents, timesteps, **conditioning.tensors)

    @torch.no_grad()
    def time_tables(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """The embedded timestep, f32 [T, C]; what the pooled text adds to it is the prompt's."""
        embed: Any = denoiser.get_submodule(_TIME)
        with torch.autocast(device_type=timesteps.device.type, enabled=False):
            return {_TIME: embed.timestep_embedder(embed.time_proj(timesteps).float()).float()}

    def use_tables(self, denoiser: nn.Module, tables: Mapping[str, Tensor], state: StepState) -> None:
        model: Any = denoiser
        model.time_text_embed = _StepAndText(tables[_TIME], model.time_text_embed.text_embedder, state)
        model.context_embedder = FrozenLinear(model.context_embedder)
        for norm in _adaptive_norms(denoiser).values():
            norm.linear = FrozenLinear(norm.linear)

    def quantizable_layers(self, denoiser: nn.Module) -> dict[str, str]:
        modulations = {f"{path}.linear" for path in _adaptive_norms(denoiser)}
        return {
            layer: _input_tensor(layer)
            for layer, module in denoiser.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            and layer not in modulations
            and layer.split(".")[0] not in (_TIME, _CONTEXT)
        }

    def capture(
        self, denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int, multiple: int = 0
    ) -> ir.Model:
        texts, limit = self._examples(denoiser, tokens), self.latent_limit(denoiser)
        channels, *size = latent_shape
        sample = torch.randn(2, channels, *different(size, multiple, limit))
        inputs = {"sample": sample, "timestep": torch.ones(1), **texts}
        return capture(
            _ByOurNames(denoiser),
            inputs,
            inside="denoiser",
            batched=["sample", *texts],
            outputs=["model_output"],
            batch="2*batch",
            sized=FreeSize("sample", multiple, (HEIGHT, WIDTH), limit) if multiple else None,
        )

    def cuts(self, tables: Mapping[str, Tensor]) -> GraphCuts:
        table = tables[_TIME].numpy()
        return GraphCuts([KeepModulation(table)], [CutModulation(len(table))])

    def _examples(self, denoiser: Any, tokens: int) -> dict[str, Tensor]:
        """Conditioning of two prompts. The CLIP encoders' widths add up to that of the pooled text."""
        width = denoiser.config.pooled_projection_dim
        texts = {TEXT_INPUT: torch.randn(2, tokens, width), POOLED_INPUT: torch.randn(2, width)}
        if self.has_t5:
            texts[T5_INPUT] = torch.randn(2, T5_TOKENS, denoiser.config.joint_attention_dim)
        return texts


class _StepAndText(nn.Module):
    """Stands where ``time_text_embed`` was: a row of a table for the step, plus the embedded pooled text.

    Args:
        table: FP32 [T, C].
        text_embedder: its layers are frozen from now on.
        state: holds the batch's steps.
    """

    table: Tensor

    def __init__(self, table: Tensor, text_embedder: nn.Module, state: StepState) -> None:
        super().__init__()
        freeze_linears_(text_embedder)
        self.text_embedder, self.state = text_embedder, state
        self.register_buffer("table", table.detach().to(torch.float32), persistent=False)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """[B, C]; the timestep is not read."""
        embedded: Tensor = self.text_embedder(pooled)
        return self.table[self.state.steps] + embedded


def _adaptive_norms(denoiser: nn.Module) -> dict[str, Any]:
    """Path -> normalization whose ``linear`` makes scales, shifts and gates of the time and text embedding."""
    return {
        path: module
        for path, module in denoiser.named_modules()
        if "AdaLayerNorm" in type(module).__name__ and hasattr(module, "linear")
    }


def _input_tensor(layer: str) -> str:
    owner, _, part = layer.rpartition(".")
    return f"{owner}.{_QUERY_KEY_VALUE[part]}" if part in _QUERY_KEY_VALUE else layer


def _call(
    denoiser: Any,
    sample: Tensor,
    timestep: Tensor,
    text_embeddings: Tensor,
    pooled_embeddings: Tensor,
    t5_embeddings: Tensor | None = None,
) -> Tensor:
    """A call of the MMDiT with the texts joined as diffusers' pipeline does: CLIP padded with zeros, then T5."""
    room = denoiser.config.joint_attention_dim - text_embeddings.shape[-1]
    rows = T5_TOKENS if t5_embeddings is None else 0
    text = nn.functional.pad(text_embeddings, (0, room, 0, rows))
    if t5_embeddings is not None:
        text = torch.cat([text, t5_embeddings], dim=1)
    output: Tensor = denoiser(
        hidden_states=sample,
        encoder_hidden_states=text,
        pooled_projections=pooled_embeddings,
        timestep=timestep.expand(sample.shape[0]) if timestep.ndim == 0 else timestep,
        return_dict=False,
    )[0]
    return output


class _ByOurNames(nn.Module):
    """An MMDiT that takes what a package names."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text_embeddings: Tensor,
        pooled_embeddings: Tensor,
        t5_embeddings: Tensor | None = None,
    ) -> Tensor:
        return _call(self.denoiser, sample, timestep, text_embeddings, pooled_embeddings, t5_embeddings)
