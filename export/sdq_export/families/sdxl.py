"""Stable Diffusion XL: two CLIP text encoders, and a time path that is told the pooled prompt and the image's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_engines.package.layout import VAE_DECODER, VAE_ENCODER
from sdq_engines.package.schema import SIZE_INPUT, CallDefaults
from sdq_export.conditioning import POOLED_INPUT, TEXT_INPUT, Conditioning
from sdq_export.families.base import Family
from sdq_export.families.checks import check_text_encoders, check_vae
from sdq_export.families.encoder import EncoderSpec
from sdq_export.families.network import GraphCuts
from sdq_export.families.text import PenultimateAndPooled, PenultimateHiddenState
from sdq_export.families.unet import UNet, capture_unet, check_conditions, is_unet
from sdq_export.passes.prologue import CutPrologue, KeepPrologue
from sdq_export.passes.prompt_time_rows import CutTimeRows, OutputTimeRows
from sdq_export.step_state import StepState
from sdq_export.time_path import FrozenLinear, NoTimeProjection, StepRow

__all__ = ["StableDiffusionXL"]

_TABLE = "time_embedding"


class _UNet(UNet):
    """A UNet whose time path is told the pooled prompt and the size.

    A ResNet block adds ``time_emb_proj(silu(emb_t + added))``, where ``emb_t`` depends on the step and ``added`` on the
    pooled prompt and the size. The table is therefore of ``emb_t`` [T, E], and the prologue computes the blocks' rows.
    """

    def owns(self, denoiser: nn.Module) -> bool:
        config: Any = denoiser.config if is_unet(denoiser) else None
        return config is not None and config.addition_embed_type == "text_time"

    def predict(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        given = conditioning.tensors
        output: Tensor = denoiser(
            latents,
            timesteps,
            given[TEXT_INPUT],
            added_cond_kwargs={"text_embeds": given[POOLED_INPUT], "time_ids": given[SIZE_INPUT]},
            return_dict=False,
        )[0]
        return output

    @torch.no_grad()
    def time_tables(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """``time_embedding`` -> f32 [T, E], the part of the embedding that depends on the timestep alone."""
        _check_time_path(denoiser)
        model: Any = denoiser
        with torch.autocast(device_type=timesteps.device.type, enabled=False):
            return {_TABLE: model.time_embedding(model.time_proj(timesteps).float()).float()}

    def use_tables(self, denoiser: nn.Module, tables: Mapping[str, Tensor], state: StepState) -> None:
        model: Any = denoiser
        model.time_proj, model.time_embedding = NoTimeProjection(), StepRow(tables[_TABLE], state)
        model.add_embedding.linear_1 = FrozenLinear(model.add_embedding.linear_1)
        model.add_embedding.linear_2 = FrozenLinear(model.add_embedding.linear_2)
        for block in model.modules():
            if getattr(block, "time_emb_proj", None) is not None:
                block.time_emb_proj = FrozenLinear(block.time_emb_proj)

    def capture(
        self, denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int, multiple: int = 0
    ) -> ir.Model:
        model: Any = denoiser
        pooled = model.add_embedding.linear_1.in_features - 6 * model.config.addition_time_embed_dim
        prompts = {
            "encoder_hidden_states": torch.randn(2, tokens, model.config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": torch.randn(2, pooled), "time_ids": torch.full((2, 6), 64.0)},
        }
        return capture_unet(denoiser, latent_shape, prompts, [TEXT_INPUT, POOLED_INPUT, SIZE_INPUT], multiple)

    def cuts(self, tables: Mapping[str, Tensor]) -> GraphCuts:
        table = tables[_TABLE].numpy()
        return GraphCuts(
            [OutputTimeRows(table), KeepPrologue(TEXT_INPUT, also=(POOLED_INPUT, SIZE_INPUT))],
            [CutTimeRows(len(table), (POOLED_INPUT, SIZE_INPUT)), CutPrologue(TEXT_INPUT)],
        )


class StableDiffusionXL(Family):
    """Stable Diffusion XL 1.0 (the base model), and models of its form."""

    name = "stable-diffusion-xl"
    pipeline = "StableDiffusionXLPipeline"
    inpainting_pipeline = "StableDiffusionXLInpaintPipeline"
    denoiser = "unet"
    network = _UNet()
    parts: ClassVar = {
        "unet": "diffusers.UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.CLIPTextModel",
        "text_encoder_2": "transformers.CLIPTextModelWithProjection",
        "tokenizer": "transformers.CLIPTokenizer",
        "tokenizer_2": "transformers.CLIPTokenizer",
    }
    encoders = (
        EncoderSpec("text_encoder", "tokenizer", (TEXT_INPUT,), PenultimateHiddenState),
        EncoderSpec("text_encoder_2", "tokenizer_2", (TEXT_INPUT, POOLED_INPUT), PenultimateAndPooled),
    )
    recipe = "sdxl"
    default_steps, default_guidance = 50, 5.0
    inpainting_guidance = 7.5
    call_defaults = CallDefaults(image_strength=0.3, inpaint_strength=0.9999)

    def check(self) -> None:
        checkpoint = self.checkpoint
        unet = checkpoint.skeleton
        _check_time_path(unet)
        check_text_encoders(self, unet.config.cross_attention_dim)
        check_vae(self)
        if checkpoint.index.get("requires_aesthetics_score"):
            raise SdqError(
                f"The model_index.json of {checkpoint.model} has requires_aesthetics_score = true, which is not "
                "supported.",
                "Stable Diffusion XL's refiner asks for it; its base model does not.",
            )
        if not unet.config.addition_time_embed_dim:
            raise SdqError(
                f"The file unet/config.json of {checkpoint.model} has addition_time_embed_dim = "
                f"{unet.config.addition_time_embed_dim}; the width of an embedded size is wanted.",
                "Stable Diffusion XL has 256.",
            )
        wanted = 6 * unet.config.addition_time_embed_dim + checkpoint.part("text_encoder_2").config.projection_dim
        if unet.add_embedding.linear_1.in_features != wanted:
            raise SdqError(
                f"The denoiser's add_embedding takes {unet.add_embedding.linear_1.in_features} values; the second text "
                f"encoder and six numbers of the size make {wanted}.",
                "Stable Diffusion XL's refiner is not supported; its base model is.",
            )

    @property
    def full_precision(self) -> tuple[str, ...]:
        """The VAE, where its config says that it must be upcast: SDXL's own overflows in FP16."""
        return (VAE_DECODER, VAE_ENCODER) if self.checkpoint.vae.config.force_upcast else ()

    @property
    def zeros_for_no_prompt(self) -> bool:
        return bool(self.checkpoint.index.get("force_zeros_for_empty_prompt", True))

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros_for_no_prompt, "add_watermarker": False}

    def encode_prompts(self, prompts: Sequence[str | None]) -> Conditioning:
        """Embeddings of both encoders side by side, the second's pooled one, and the checkpoint's own image size."""
        tensors = dict(super().encode_prompts(prompts).tensors)
        if self.zeros_for_no_prompt:
            absent = torch.tensor([prompt is None for prompt in prompts])
            for tensor in tensors.values():
                tensor[absent] = 0
        size = self.image_size
        tensors[SIZE_INPUT] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(prompts), 1)
        return Conditioning(tensors)


def _check_time_path(unet: Any) -> None:
    check_conditions(unet, {"addition_embed_type": "text_time"})
    if unet.time_embed_act is not None:
        raise SdqError(f"The denoiser's time_embedding_act_fn={unet.config.time_embedding_act_fn!r} is not supported.")
