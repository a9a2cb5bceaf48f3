"""Load a source checkpoint: a local diffusers folder or a hub id, safetensors only."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError
from sdq_engines.files import sha256_file
from sdq_export.inpainting import extra_channels, remember_whole_mask

__all__ = ["Source", "load_source"]

_WEIGHTS = ("unet", "vae", "text_encoder")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
_PATTERNS = ["*.json", "*.txt", "*.safetensors", "LICENSE*", "README.md"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source:
    """A Stable Diffusion checkpoint in diffusers' layout. Components load on first use: torch, FP32, eval, on the CPU.

    Args:
        folder: the local folder.
        model: what the user named, a path or a hub id.
        revision: the hub's revision, if any.
    """

    def __init__(self, folder: Path, model: str, revision: str | None) -> None:
        self.folder, self.model, self.revision = folder, model, revision
        self.index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))

    @cached_property
    def sha256(self) -> str:
        """Hash over the denoiser's weight files, in hexadecimal."""
        return self.weights_sha256("unet")

    def weights_sha256(self, component: str) -> str:
        """Hash over the weight files of "unet", "vae" or "text_encoder", in hexadecimal."""
        files = self._weight_files(component)
        if len(files) == 1:
            return sha256_file(files[0])
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()

    @cached_property
    def unet(self) -> Any:
        """diffusers' UNet2DConditionModel."""
        from diffusers import UNet2DConditionModel

        unet = self._component(UNet2DConditionModel, "unet")
        if extra_channels(unet):
            remember_whole_mask(unet, self.vae)
        return unet

    @cached_property
    def vae(self) -> Any:
        """diffusers' AutoencoderKL."""
        from diffusers import AutoencoderKL

        return self._component(AutoencoderKL, "vae")

    @cached_property
    def text_encoder(self) -> Any:
        """transformers' CLIPTextModel."""
        from transformers import CLIPTextModel

        return self._component(CLIPTextModel, "text_encoder")

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' CLIPTokenizer."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler that the checkpoint names."""
        import diffusers

        name = self.index["scheduler"][1]
        return getattr(diffusers, name).from_pretrained(self.folder / "scheduler", local_files_only=True)

    def pipeline(self, scheduler: Any, kind: str = "StableDiffusionPipeline") -> Any:
        """diffusers' own pipeline of these components, silent and without a safety checker; `kind` is its class."""
        import diffusers

        made = getattr(diffusers, kind)(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        made.set_progress_bar_config(disable=True)
        return made

    @cached_property
    def license_file(self) -> Path | None:
        """The licence that travels with the package, if the checkpoint brings one."""
        return next(iter(sorted(self.folder.glob("LICENSE*"))), None)

    def _weight_files(self, component: str) -> list[Path]:
        """The component's safetensors: the plain ones where there are any, else the fp16 variant's."""
        files = sorted((self.folder / component).glob("*.safetensors"))
        plain = [file for file in files if ".fp16" not in file.name and ".non_ema" not in file.name]
        return plain or [file for file in files if ".fp16" in file.name]

    def _component(self, kind: Any, name: str) -> Any:
        import torch

        variant = "fp16" if all(".fp16" in file.name for file in self._weight_files(name)) else None
        try:
            loaded = kind.from_pretrained(
                self.folder / name,
                torch_dtype=torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SdqError(f"The {name} of {self.model} cannot be loaded: {error}") from error
        return loaded.eval().requires_grad_(False)


def load_source(model: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint and check that it can be used, before any weight is read.

    Args:
        model: a local folder in diffusers' layout, or a hub id such as "CompVis/stable-diffusion-v1-4".
        revision: branch, tag or commit on the hub.

    Raises:
        SdqError: it does not exist, is no diffusers folder, is another pipeline, or holds pickles only.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = _from_hub(str(model), revision)
    if not (folder / "model_index.json").is_file():
        raise SdqError(
            f"{model} is not a diffusers folder: it has no model_index.json.",
            "diffusers makes one of a single file: StableDiffusionPipeline.from_single_file(...).save_pretrained(...).",
        )
    try:
        source = Source(folder.resolve(), str(model), revision)
    except ValueError as error:
        raise SdqError(f"The model_index.json of {model} is not valid JSON: {error}.") from error
    if source.index.get("_class_name") not in _PIPELINES:
        raise SdqError(
            f"{model} is a {source.index.get('_class_name')}; this version takes {_PIPELINES[0]} checkpoints "
            "(Stable Diffusion 1.x and 2.x) and their inpainting variants."
        )
    for name in _WEIGHTS:
        _check_weights(source, name)
    return source


def _check_weights(source: Source, component: str) -> None:
    if source._weight_files(component):
        return
    pickles = [file.name for file in (source.folder / component).glob("*") if file.suffix in _PICKLES]
    if pickles:
        raise SdqError(
            f"The {component} of {source.model} comes as a pickle ({pickles[0]}), "
            "and loading a pickle can run any code; safetensors are wanted.",
            "Convert it where you trust it: load it with diffusers and save_pretrained(..., safe_serialization=True).",
        )
    raise SdqError(f"{source.model} has no {component}/*.safetensors.")


def _from_hub(model: str, revision: str | None) -> Path:
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not looks_like_id:
        raise SdqError(
            f"The model {model} does not exist.", "Give a diffusers folder, a hub id (owner/name), or shapes-64."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # The hub client raises a dozen types for "not there" and "no network" alike.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SdqError(
            f"The model {model} is neither a local folder nor to be had from the hub: {reason}",
            "Check the name, or download it elsewhere and give the folder.",
        ) from error
