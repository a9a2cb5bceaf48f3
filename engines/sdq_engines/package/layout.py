"""Every file name of a package, spelled once (docs/package-format.md)."""

from __future__ import annotations

__all__ = [
    "COMPONENTS",
    "DENOISER",
    "ENGINES",
    "LICENSE",
    "MANIFEST",
    "NOTICE",
    "OPTIONAL_COMPONENTS",
    "PROLOGUE",
    "SAMPLER",
    "TEXT_ENCODER",
    "TOKENIZER",
    "VAE_DECODER",
    "VAE_ENCODER",
    "engine_folder",
    "model_file",
]

MANIFEST = "manifest.json"
LICENSE = "LICENSE"
NOTICE = "NOTICE"
SAMPLER = "sampler.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
ENGINES = "engines"

TEXT_ENCODER = "text_encoder"
PROLOGUE = "prologue"
DENOISER = "denoiser"
VAE_DECODER = "vae_decoder"
VAE_ENCODER = "vae_encoder"

#: The ONNX components in the order in which a prompt passes through them.
COMPONENTS = (TEXT_ENCODER, PROLOGUE, DENOISER, VAE_DECODER)

#: What a package may have beside them; `manifest.components` lists what it has.
OPTIONAL_COMPONENTS = (VAE_ENCODER,)


def model_file(component: str) -> str:
    """The component's ONNX file, relative to the package; its weights, if external, are beside it in `.data`."""
    return f"{component}/model.onnx"


def engine_folder(engine: str) -> str:
    """What the engine of this name loads, relative to the package."""
    return f"{ENGINES}/{engine}"
