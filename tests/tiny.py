"""Tiny checkpoints of seeded random weights, normalizations too: ones and zeros hide errors. One for each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdq_export.conditioning import Conditioning

WIDTH, MAX_LENGTH = 32, 16
#: Of SDXL's second text encoder, and of its pooled embedding.
SECOND_WIDTH, POOLED_WIDTH = 48, 40

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SAFETY = {"requires_safety_checker": False, "safety_checker": [None, None]}


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    """Three levels, cross-attention in two, 8x8 latents; SD's structure in every respect but its size."""
    return _tiny_unet(seed, attention_head_dim=8)


def _tiny_unet(seed: int, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )
    return _randomize_norms(unet).eval().requires_grad_(False)


def prompt_rows(text: Tensor) -> Conditioning:
    """What a Stable Diffusion denoiser is told of prompts: their embeddings [n, L, D] alone."""
    return Conditioning({"text_embeddings": text})


def tiny_sd2_unet(seed: int = 0) -> UNet2DConditionModel:
    """The same with Stable Diffusion 2's forms: linear projections, heads by level, upcast attention."""
    return _tiny_unet(seed, attention_head_dim=(4, 4, 8), use_linear_projection=True, upcast_attention=True)


def tiny_sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's forms: no attention at the first level, deeper transformers below, pooled prompt and size added."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH + SECOND_WIDTH,
        norm_num_groups=8,
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED_WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return _randomize_norms(unet).eval().requires_grad_(False)


def write_tiny_sd(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint into `folder` and return it."""
    tiny_unet(seed).save_pretrained(folder / "unet")
    _tiny_vae().save_pretrained(folder / "vae")
    tokenizer = write_tiny_tokenizer(folder / "tokenizer")
    _randomize_norms(CLIPTextModel(_text_config(tokenizer, WIDTH))).save_pretrained(folder / "text_encoder")
    DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    return _write_index(folder, "StableDiffusionPipeline", "DDIMScheduler", _SAFETY)


def write_tiny_sd2(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 2's form: v-prediction, a text encoder with OpenCLIP's activation and separate padding."""
    tiny_sd2_unet(seed).save_pretrained(folder / "unet")
    _tiny_vae().save_pretrained(folder / "vae")
    tokenizer = write_tiny_tokenizer(folder / "tokenizer", pad_token="!")
    config = _text_config(tokenizer, WIDTH, hidden_act="gelu", num_hidden_layers=3)
    _randomize_norms(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    PNDMScheduler(
        **BETAS, prediction_type="v_prediction", set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    return _write_index(folder, "StableDiffusionPipeline", "PNDMScheduler", _SAFETY)


def write_tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """SDXL's form: two text encoders with tokenizers that pad differently, a VAE that asks to be upcast."""
    tiny_sdxl_unet(seed).save_pretrained(folder / "unet")
    _tiny_vae(scaling_factor=0.13025, force_upcast=True).save_pretrained(folder / "vae")
    first = write_tiny_tokenizer(folder / "tokenizer")
    second = write_tiny_tokenizer(folder / "tokenizer_2", pad_token="!")
    _randomize_norms(CLIPTextModel(_text_config(first, WIDTH))).save_pretrained(folder / "text_encoder")
    config = _text_config(second, SECOND_WIDTH, hidden_act="gelu", num_hidden_layers=3, projection_dim=POOLED_WIDTH)
    _randomize_norms(CLIPTextModelWithProjection(config)).save_pretrained(folder / "text_encoder_2")
    EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1).save_pretrained(folder / "scheduler")
    others = {
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    return _write_index(folder, "StableDiffusionXLPipeline", "EulerDiscreteScheduler", others)


def _tiny_vae(**options: Any) -> nn.Module:
    return _randomize_norms(
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
            **options,
        )
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **options,
        }
    )


def _write_index(folder: Path, pipeline: str, scheduler: str, others: dict[str, Any]) -> Path:
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **others,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def write_tiny_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with the 256 byte symbols, a few merges, and no words beyond."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["r e", "re d</w>", "c i", "ci r", "cir c", "l e</w>", "circ le</w>"]
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_LENGTH, **options
    ).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _randomize_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model
