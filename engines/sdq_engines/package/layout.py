"""Every file name of a package, spelled once (docs/package-format.md)."""

from __future__ import annotations

__all__ = [
    "DENOISER",
    "ENGINES",
    "LICENSE",
    "MANIFEST",
    "NOTICE",
    "PROLOGUE",
    "SAMPLER",
    "TEXT_ENCODER",
    "VAE_DECODER",
    "VAE_ENCODER",
    "engine_folder",
    "model_file",
    "runs_per_prompt",
    "tokenizer_file",
]

MANIFEST = "manifest.json"
LICENSE = "LICENSE"
NOTICE = "NOTICE"
SAMPLER = "sampler.safetensors"
ENGINES = "engines"

TEXT_ENCODER = "text_encoder"
PROLOGUE = "prologue"
DENOISER = "denoiser"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"


def runs_per_prompt(component: str) -> bool:
    """Whether it is a text encoder or the prologue: its batch counts texts, at most two an image."""
    return component == PROLOGUE or component.startswith(TEXT_ENCODER)


def model_file(component: str) -> str:
    """The component's ONNX file, relative to the package; its weights, if external, are beside it in `.data`."""
    return f"{component}/model.onnx"


def tokenizer_file(tokenizer: str) -> str:
    """The file of the tokenizer of this name, relative to the package."""
    return f"{tokenizer}/tokenizer.json"


def engine_folder(engine: str) -> str:
    """What the engine of this name loads, relative to the package."""
    return f"{ENGINES}/{engine}"
