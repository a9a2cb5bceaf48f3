"""Checkpoints of Stable Diffusion's architecture, at any width, filled with seeded random weights.

    python benchmarks/checkpoints.py FOLDER --width 0.5 --latent-size 32

The layout is diffusers' own, so they are loaded by the code that loads real ones. Speed, size and memory do not depend
on what the weights are; images do, and are noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdq_deploy.shapes64.train.text import build_tokenizer, save_tokenizer

TEXT_WIDTH, MAX_LENGTH = 768, 77

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def sd14_unet(width: float = 1.0, latent_size: int = 64) -> UNet2DConditionModel:
    """SD v1-4's UNet (its published config), every channel count times `width`."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=tuple(int(channels * width) for channels in (320, 640, 1280, 1280)),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
    )


def write_sd14(folder: Path, width: float = 1.0, latent_size: int = 64, seed: int = 0) -> Path:
    """Write a whole checkpoint whose denoiser has SD v1-4's shape; its text encoder and autoencoder are small ones.

    Args:
        folder: becomes a diffusers folder, FP16 safetensors.
        width: of the UNet, relative to the published one.
        latent_size: latents are latent_size x latent_size.
    """
    torch.manual_seed(seed)
    _random_norms(sd14_unet(width, latent_size)).half().save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=8 * latent_size,
    )
    _random_norms(vae).half().save_pretrained(folder / "vae")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = MAX_LENGTH
    save_tokenizer(tokenizer, folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=12,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _random_norms(CLIPTextModel(config)).half().save_pretrained(folder / "text_encoder")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_INDEX, indent=2), encoding="utf-8")
    return folder


def _random_norms(model: nn.Module) -> nn.Module:
    """Normalizations start as ones and zeros, which hide errors that cancel."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--latent-size", type=int, default=64)
    arguments = parser.parse_args()
    print(write_sd14(arguments.folder, arguments.width, arguments.latent_size))


if __name__ == "__main__":
    main()
