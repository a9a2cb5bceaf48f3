"""Tiny checkpoints of every family: the published structure, few channels, seeded random weights, norms too."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer

from sdq_deploy.random_checkpoints import T5, clip_tokenizer, randomize_, t5_tokenizer, write_checkpoint
from sdq_export.conditioning import Conditioning

WIDTH, MAX_LENGTH, T5_MAX_LENGTH = 32, 16, 24
#: Of the second text encoder, and of its pooled embedding.
SECOND_WIDTH, POOLED_WIDTH = 48, 40

_UNET = {
    "sample_size": 8,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_NINE = {"in_channels": 9}
_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
_TOKENIZER = {"model_max_length": MAX_LENGTH}
_DDIM = {
    "_class_name": ["diffusers", "DDIMScheduler"],
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_SD2_UNET = {**_UNET, "attention_head_dim": [4, 4, 8], "use_linear_projection": True, "upcast_attention": True}
_SDXL_UNET = {
    **_UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 1, 2],
    "use_linear_projection": True,
    "cross_attention_dim": WIDTH + SECOND_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED_WIDTH,
}


def tiny_unet(seed: int = 0, in_channels: int = 4) -> UNet2DConditionModel:
    """Three levels, cross-attention in two, 8x8 latents; SD's structure in every respect but its size."""
    unet: UNet2DConditionModel = randomize_(UNet2DConditionModel(**_UNET, in_channels=in_channels), seed)
    return unet


def tiny_sd2_unet(seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion 2's forms: linear projections, heads by level, upcast attention."""
    unet: UNet2DConditionModel = randomize_(UNet2DConditionModel(**_SD2_UNET), seed)
    return unet


def tiny_sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's forms: no attention at the first level, deeper transformers below, pooled prompt and size added."""
    unet: UNet2DConditionModel = randomize_(UNet2DConditionModel(**_SDXL_UNET), seed)
    return unet


def prompt_rows(text: Tensor) -> Conditioning:
    """What a Stable Diffusion denoiser is told of prompts: their embeddings [n, L, D] alone."""
    return Conditioning({"text_embeddings": text})


def write_tiny_sd(folder: Path, seed: int = 0, inpainting: bool = False) -> Path:
    """Stable Diffusion 1, with DDIM; 8x8 latents, 64x64 pixels; for inpainting nine channels. Returns the folder.

    Its index names a safety checker, as the published one does.
    """
    unet, kind = (_UNET | _NINE, "StableDiffusionInpaintPipeline") if inpainting else (_UNET, None)
    changes = {"unet": unet, "vae": _VAE, "text_encoder": _clip(WIDTH), "tokenizer": _TOKENIZER, "scheduler": _DDIM}
    write_checkpoint(folder, "sd14", changes, pipeline=kind, seed=seed)
    index = folder / "model_index.json"
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps({**json.loads(index.read_text("utf-8")), **checker}), "utf-8")
    return folder


def write_tiny_sd2(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 2.1: v-prediction, a text encoder with OpenCLIP's activation and separate padding."""
    encoder = _clip(WIDTH) | {"hidden_act": "gelu", "num_hidden_layers": 3}
    changes = {"unet": _SD2_UNET, "vae": _VAE, "text_encoder": encoder, "tokenizer": _TOKENIZER}
    return write_checkpoint(folder, "sd21", changes, seed=seed)


def write_tiny_sdxl(folder: Path, seed: int = 0, inpainting: bool = False) -> Path:
    """Stable Diffusion XL: two text encoders with tokenizers that pad differently, a VAE that asks to be upcast.

    For inpainting, a denoiser of nine channels.
    """
    unet, kind = (_SDXL_UNET | _NINE, "StableDiffusionXLInpaintPipeline") if inpainting else (_SDXL_UNET, None)
    changes = {"unet": unet, "vae": _VAE, **_two_clips(POOLED_WIDTH)}
    return write_checkpoint(folder, "sdxl", changes, pipeline=kind, seed=seed)


def write_tiny_sd3(folder: Path, seed: int = 0, t5: bool = False, medium: bool = False) -> Path:
    """Stable Diffusion 3: an MMDiT of three blocks, two CLIP encoders and, if wanted, a T5; 16-channel 8x8 latents.

    Medium: with the blocks of Stable Diffusion 3.5 medium, a second attention in the first two and normalized queries.
    """
    transformer: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 96,
        "pooled_projection_dim": WIDTH + SECOND_WIDTH,
        "pos_embed_max_size": 24,  # a table large enough for the exporter to leave it alone, as the real one is
    }
    if medium:
        transformer |= {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"}
    last = {
        "d_model": 96,
        "d_ff": 48,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": len(t5_tokenizer()),
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    }
    changes = {
        "transformer": transformer,
        "vae": _VAE,
        **_two_clips(SECOND_WIDTH),
        "text_encoder_3": last,
        "tokenizer_3": {"model_max_length": T5_MAX_LENGTH},
    }
    without: Collection[str] = () if t5 else T5
    return write_checkpoint(folder, "sd3", changes, without=without, seed=seed)


def write_tiny_tokenizer(folder: Path, **options: Any) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with the 512 byte symbols, a few merges, and no words beyond."""
    clip_tokenizer(MAX_LENGTH, **options).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd": write_tiny_sd,
    "sd-inpainting": partial(write_tiny_sd, inpainting=True),
    "sd2": write_tiny_sd2,
    "sdxl": write_tiny_sdxl,
    "sdxl-inpainting": partial(write_tiny_sdxl, inpainting=True),
    "sd3": write_tiny_sd3,
    "sd3-t5": partial(write_tiny_sd3, t5=True),
    "sd3.5-medium": partial(write_tiny_sd3, medium=True),
}


def _two_clips(pooled: int) -> dict[str, dict[str, Any]]:
    """SDXL's and SD3's pair of text encoders; `pooled` is the width of the second's projection."""
    second = {"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": pooled}
    return {
        "text_encoder": _clip(WIDTH),
        "text_encoder_2": _clip(SECOND_WIDTH) | second,
        "tokenizer": _TOKENIZER,
        "tokenizer_2": _TOKENIZER,
    }


def _clip(width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(clip_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
    }
