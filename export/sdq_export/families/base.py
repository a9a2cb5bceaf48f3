"""`Family`: everything that differs between model families, bound to one checkpoint. One file a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import CallDefaults
from sdq_export.conditioning import Conditioning
from sdq_export.families.component import ComponentExport
from sdq_export.families.encoder import EncoderSpec, TextEncoder
from sdq_export.families.network import Network
from sdq_export.families.vae import vae_decoder_export, vae_encoder_export
from sdq_export.parts import Parts

__all__ = ["Family"]


class Family(ABC):
    """What the rest of the project asks of a checkpoint's family. The classes are listed in `families.FAMILIES`.

    Args:
        checkpoint: which one.

    Attributes:
        name: the manifest's word for it.
        pipeline: diffusers' pipeline, the ``_class_name`` of model_index.json.
        inpainting_pipeline: its inpainting one, if checkpoints of that are of the family too.
        denoiser: the denoiser's folder in the checkpoint.
        network: what that denoiser is.
        parts: folder of a checkpoint -> the class that loads it, in diffusers or transformers.
        encoders: in the order in which the pipeline joins their outputs.
        recipe: the recipe that a training takes by default.
        default_steps, default_guidance: the pipeline's own, for a model exported without saying otherwise.
        inpainting_guidance: `default_guidance` of the inpainting pipeline, where that has another.
        call_defaults: what calls of its image-to-image and inpainting pipelines take.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    inpainting_pipeline: ClassVar[str | None] = None
    denoiser: ClassVar[str]
    network: ClassVar[Network]
    parts: ClassVar[Mapping[str, str]]
    encoders: ClassVar[tuple[EncoderSpec, ...]]
    recipe: ClassVar[str]
    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    inpainting_guidance: ClassVar[float | None] = None
    call_defaults: ClassVar[CallDefaults]

    def __init__(self, checkpoint: Parts) -> None:
        self.checkpoint = checkpoint

    @classmethod
    def pipelines(cls) -> tuple[str, ...]:
        """Names of diffusers' pipelines whose checkpoints are of the family."""
        return (cls.pipeline, cls.inpainting_pipeline) if cls.inpainting_pipeline else (cls.pipeline,)

    @classmethod
    def fits(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        """Whether the checkpoint in this folder, of this model_index.json, is of the family."""
        return index.get("_class_name") in cls.pipelines()

    @abstractmethod
    def check(self) -> None:
        """Refuse what this family's graphs would compute wrongly.

        Raises:
            SdqError: naming the component and its setting.
        """

    @property
    def guidance(self) -> float:
        """What the pipeline that the checkpoint names guides by, where the caller names nothing."""
        inpaints = self.checkpoint.index.get("_class_name") == self.inpainting_pipeline
        return self.inpainting_guidance if inpaints and self.inpainting_guidance else self.default_guidance

    # Sizes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents at the checkpoint's own size."""
        return int(self.checkpoint.skeleton.config.out_channels), *self.latent_size

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) by the denoiser's own sample size.

        Raises:
            SdqError: it names none.
        """
        size = self.checkpoint.skeleton.config.sample_size
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            raise SdqError(
                f"The file {self.denoiser}/config.json of {self.checkpoint.model} has sample_size = {size!r}; the "
                "height and width of the latents are wanted.",
                'Set it, for example "sample_size": 64 for images of 512x512 pixels.',
            )
        return height, width

    @property
    def extra_channels(self) -> int:
        """Channels that the denoiser takes beside the latents; 0 for text to image (`Network.extra_channels`)."""
        return self.network.extra_channels(self.checkpoint.skeleton)

    @property
    def latent_multiple(self) -> int:
        """What the latents' height and width must be multiples of, where they are free."""
        return self.network.latent_multiple(self.checkpoint.skeleton)

    @property
    def latent_limit(self) -> int | None:
        """The most that they may be, where they are free; None for no limit."""
        return self.network.latent_limit(self.checkpoint.skeleton)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide a latent pixel is: 8 for a VAE of four levels."""
        return int(2 ** (len(self.checkpoint.vae.config.block_out_channels) - 1))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels at the checkpoint's own size."""
        _, height, width = self.latent_shape
        factor = self.pixels_per_latent
        return height * factor, width * factor

    # What the pipeline does

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Components of the package that overflow in FP16: every engine computes them in FP32."""
        return ()

    @property
    def zeros_for_no_prompt(self) -> bool:
        """Whether guidance without a negative prompt sees zeros in place of the empty prompt's embeddings."""
        return False

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """Arguments of diffusers' pipeline beside the parts and the scheduler."""
        return {}

    # Prompts

    @property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """Those of `encoders`, with the checkpoint's weights and tokenizers."""
        return tuple(TextEncoder(spec, self.checkpoint, self.pipeline) for spec in self.encoders)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt for the first text encoder, all chunks."""
        first = self.text_encoders[0]
        return first.chunks * first.length

    def encode_prompts(self, prompts: Sequence[str | None]) -> Conditioning:
        """What the denoiser is told of each prompt, as diffusers' pipeline makes it; float32 on the CPU.

        Args:
            prompts: None is the unconditional half of guidance where the user gives no negative prompt, which is not
                the empty prompt in every family. Text encoders compute where they are.
        """
        found: dict[str, list[Tensor]] = {}
        for encoder in self.text_encoders:
            for name, tensor in encoder.embed(prompts).items():
                found.setdefault(name, []).append(tensor)
        return Conditioning({name: torch.cat(parts, dim=-1) for name, parts in found.items()})

    # Components beside the denoiser

    def vae_decoder(self, free_size: bool = False) -> ComponentExport:
        """How the VAE's decoder becomes a component."""
        return vae_decoder_export(self.latent_shape, free_size)

    def vae_encoder(self, free_size: bool = False) -> ComponentExport:
        """How the VAE's encoder becomes a component."""
        return vae_encoder_export(self.image_size, self.pixels_per_latent if free_size else 0)
