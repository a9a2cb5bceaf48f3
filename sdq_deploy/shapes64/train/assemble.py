"""Putting the trained parts together as one diffusers folder, FP16 safetensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from sdq_deploy.shapes64.train.denoiser import DenoiserConfig, Ema, build_scheduler, build_unet
from sdq_deploy.shapes64.train.text import build_text_encoder

__all__ = ["assemble", "load_trained"]

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes-64

A small text-to-image latent diffusion model of captioned shapes (64x64 pixels, latents 4x8x8), trained from scratch on
procedurally drawn scenes by `python -m sdq_deploy.shapes64.train`. `classifier/` holds the classifier that reads which
shapes an image shows.
"""


def load_trained(work: Path) -> StableDiffusionPipeline:
    """The pipeline of the parts trained in `work`, in FP32: the autoencoder, and the denoiser's running average."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "denoiser" / "tokenizer")
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    ema = Ema({"unet": unet, "text_encoder": text_encoder}, DenoiserConfig().ema_decay)
    saved = torch.load(work / "denoiser" / "checkpoint.pt", map_location="cpu", weights_only=True)
    ema.load_state_dict(saved["ema"])
    ema.copy_to_modules()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae" / "vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble(work: Path, folder: Path) -> Path:
    """Write the parts trained in `work` to `folder`, file by file, each renamed into place; returns `folder`."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        staging = Path(name)
        load_trained(work).to(torch.float16).save_pretrained(staging, safe_serialization=True)
        _load_as_float32(staging / "text_encoder" / "config.json")
        shutil.copytree(work / "denoiser" / "tokenizer", staging / "tokenizer", dirs_exist_ok=True)
        classifier = work / "classifier" / "classifier.safetensors"
        if classifier.exists():
            (staging / "classifier").mkdir()
            shutil.copy(classifier, staging / "classifier")
        (staging / "README.md").write_text(_CARD, encoding="utf-8")
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)  # safetensors writes for its owner alone
            os.replace(path, target)
    return folder


def _load_as_float32(config: Path) -> None:
    """transformers loads in the dtype that the configuration names, diffusers in FP32: make them agree."""
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
