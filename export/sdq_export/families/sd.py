"""Stable Diffusion 1 and 2: one CLIP text encoder, a UNet whose time path depends on the timestep alone, one VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import CallDefaults
from sdq_export.conditioning import TEXT_INPUT, Conditioning
from sdq_export.families.base import Family
from sdq_export.families.checks import check_text_encoders, check_vae
from sdq_export.families.encoder import EncoderSpec
from sdq_export.families.network import GraphCuts
from sdq_export.families.text import LastHiddenState
from sdq_export.families.unet import UNet, capture_unet, check_conditions, is_unet
from sdq_export.passes.prologue import CutPrologue, KeepPrologue
from sdq_export.passes.time_tables import TimeTables
from sdq_export.step_state import StepState
from sdq_export.time_path import NoTimeProjection, StepRow

__all__ = ["StableDiffusion"]


class _UNet(UNet):
    """A UNet whose ResNet blocks add a row that depends on the timestep alone."""

    def owns(self, denoiser: nn.Module) -> bool:
        config: Any = denoiser.config if is_unet(denoiser) else None
        return config is not None and config.addition_embed_type != "text_time"

    def predict(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = denoiser(latents, timesteps, conditioning.tensors[TEXT_INPUT], return_dict=False)[0]
        return output

    @torch.no_grad()
    def time_tables(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """Path of each ResNet block -> f32 [T, C], `time_emb_proj(silu(emb_t))`; conv1's bias is not in it."""
        check_conditions(denoiser)
        model: Any = denoiser
        with torch.autocast(device_type=timesteps.device.type, enabled=False):
            embedding = model.time_embedding(model.time_proj(timesteps).float())
            if model.time_embed_act is not None:
                embedding = model.time_embed_act(embedding)
            return {
                name: block.time_emb_proj(block.nonlinearity(embedding)).float()
                for name, block in model.named_modules()
                if getattr(block, "time_emb_proj", None) is not None
            }

    def use_tables(self, denoiser: nn.Module, tables: Mapping[str, Tensor], state: StepState) -> None:
        for path, table in tables.items():
            denoiser.get_submodule(path).time_emb_proj = StepRow(table, state)
        model: Any = denoiser
        model.time_proj, model.time_embedding, model.time_embed_act = NoTimeProjection(), _NoTimeEmbedding(), None

    def capture(
        self, denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int, multiple: int = 0
    ) -> ir.Model:
        config: Any = denoiser.config
        text = {"encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim)}
        return capture_unet(denoiser, latent_shape, text, [TEXT_INPUT], multiple)

    def cuts(self, tables: Mapping[str, Tensor]) -> GraphCuts:
        rows = {block: table.numpy() for block, table in tables.items()}
        return GraphCuts([KeepPrologue(TEXT_INPUT)], [TimeTables(rows), CutPrologue(TEXT_INPUT)])


class _NoTimeEmbedding(nn.Module):
    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        return sample


class StableDiffusion(Family):
    """Stable Diffusion 1.x, 2.x, and models of their form."""

    name = "stable-diffusion"
    pipeline = "StableDiffusionPipeline"
    inpainting_pipeline = "StableDiffusionInpaintPipeline"
    denoiser = "unet"
    network = _UNet()
    parts: ClassVar = {
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModel",
        "tokenizer": "transformers.CLIPTokenizer",
    }
    encoders = (EncoderSpec("text_encoder", "tokenizer", (TEXT_INPUT,), LastHiddenState),)
    recipe = "sd"
    default_steps, default_guidance = 50, 7.5
    call_defaults = CallDefaults(image_strength=0.8, inpaint_strength=1.0)

    def check(self) -> None:
        checkpoint = self.checkpoint
        check_conditions(checkpoint.skeleton)
        check_text_encoders(self, checkpoint.skeleton.config.cross_attention_dim)
        if getattr(checkpoint.part("text_encoder").config, "use_attention_mask", None):
            raise SdqError(
                "The text encoder's use_attention_mask=True is not supported: packages encode padded prompts."
            )
        check_vae(self)
        if checkpoint.vae.config.get("shift_factor") is not None:
            raise SdqError(
                "The VAE's shift_factor is not supported; Stable Diffusion 1 and 2 have a scaling_factor alone."
            )

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
