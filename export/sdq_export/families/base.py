"""`Family`: everything that differs between model families, behind one door. One file a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.conditioning import Conditioning
from sdq_export.families.text import padded_length, write_out_vectors
from sdq_export.step_state import StepState

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = ["Family", "GraphCuts", "TextEncoder"]

_TEXT_BATCH = 64
"""Prompts that go through a text encoder together."""


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders.

    Attributes:
        component: its folder in the checkpoint, its component in the package.
        tokenizer: the folder of its tokenizer, in both.
        outputs: what it gives. Outputs of one name from several encoders are joined along the last axis, in order.
        wrap: the encoder -> the module that is captured: ``input_ids`` int64 [n, L] to a tuple of the outputs.
        max_length: L; None for the tokenizer's own.
        length_of: the tokenizer whose own length is taken; None for `tokenizer`.
    """

    component: str
    tokenizer: str
    outputs: tuple[str, ...]
    wrap: Callable[[nn.Module], nn.Module]
    max_length: int | None = None
    length_of: str | None = None

    def length(self, source: Source) -> int:
        """L, the tokens of a padded prompt."""
        return self.max_length or padded_length(source, self.length_of or self.tokenizer, self.component)

    def token_ids(self, source: Source, prompts: Sequence[str]) -> Tensor:
        """int64 [n, L], padded and cut."""
        tokenizer = source.part(self.tokenizer)
        ids: Tensor = tokenizer(
            write_out_vectors(source, tokenizer, prompts),
            padding="max_length",
            max_length=self.length(source),
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    @torch.no_grad()
    def encode(self, source: Source, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The outputs by name, computed on the encoder's device; float32 [n, ...] on the CPU."""
        encoder = source.part(self.component)
        wrapped = self.wrap(encoder)
        parts = [
            wrapped(self.token_ids(source, prompts[first : first + _TEXT_BATCH]).to(encoder.device))
            for first in range(0, len(prompts), _TEXT_BATCH)
        ]
        joined = (torch.cat(list(each)).float().cpu() for each in zip(*parts, strict=True))
        return dict(zip(self.outputs, joined, strict=True))


@dataclass(frozen=True)
class GraphCuts:
    """How a captured denoiser is cut in two: what depends on the prompts alone, and the step.

    Attributes:
        prologue: passes that keep of a captured graph what depends on the prompts (and on the table of steps) alone;
            its inputs are conditioning tensors, its outputs named values [batch, ...].
        denoiser: passes that take those values as inputs [2*batch, ...] and put the time tables, looked up by the new
            input ``step``, in the time path's place.
    """

    prologue: list[ir.passes.InPlacePass]
    denoiser: list[ir.passes.InPlacePass]


class Family(ABC):
    """What the rest of the project asks of a model family. Stateless; one instance each, in `families.FAMILIES`.

    Attributes:
        name: the manifest's word for it.
        pipeline: diffusers' pipeline, the ``_class_name`` of model_index.json.
        inpainting_pipeline: its inpainting one, if checkpoints of that are of the family too.
        denoiser: the denoiser's folder in the checkpoint.
        parts: folder of a checkpoint -> the class that loads it, in diffusers or transformers.
        text_encoders: in the order in which the pipeline joins their outputs.
        recipe: the recipe that a training takes by default.
        default_steps, default_guidance: the pipeline's own, for a model exported without saying otherwise.
        blocks: classes of the blocks that block reconstruction optimizes at once.
    """

    name: ClassVar[str]
    pipeline: ClassVar[str]
    inpainting_pipeline: ClassVar[str | None] = None
    denoiser: ClassVar[str]
    parts: ClassVar[Mapping[str, str]]
    text_encoders: ClassVar[tuple[TextEncoder, ...]]
    recipe: ClassVar[str]
    default_steps: ClassVar[int]
    default_guidance: ClassVar[float]
    blocks: ClassVar[tuple[str, ...]]

    # The checkpoint

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Names of diffusers' pipelines whose checkpoints are of the family."""
        return (self.pipeline, self.inpainting_pipeline) if self.inpainting_pipeline else (self.pipeline,)

    def fits(self, folder: Path, index: Mapping[str, Any]) -> bool:
        """Whether the checkpoint in this folder, of this model_index.json, is of the family."""
        return index.get("_class_name") in self.pipelines

    @abstractmethod
    def check_source(self, source: Source) -> None:
        """Refuse what this family's graphs would compute wrongly.

        Raises:
            SdqError: naming the component and its setting.
        """

    @abstractmethod
    def latent_shape(self, source: Source) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents at the checkpoint's own size."""

    def latent_size(self, source: Source) -> tuple[int, int]:
        """(h, w) by the denoiser's own sample size.

        Raises:
            SdqError: it names none.
        """
        size = source.skeleton.config.sample_size
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            raise SdqError(
                f"The file {self.denoiser}/config.json of {source.model} has sample_size = {size!r}; the height and "
                "width of the latents are wanted.",
                'Set it, for example "sample_size": 64 for images of 512x512 pixels.',
            )
        return height, width

    def extra_channels(self, denoiser: nn.Module) -> int:
        """How many channels the denoiser takes beside the latents, for inpainting: 1 of the mask, C of the image.

        Raises:
            SdqError: another number.
        """
        return 0

    @abstractmethod
    def latent_multiple(self, denoiser: nn.Module) -> int:
        """What the latents' height and width must be multiples of where a graph takes any size.

        Raises:
            SdqError: the denoiser is of one size.
        """

    def latent_limit(self, denoiser: nn.Module) -> int | None:
        """The most that the latents' height and width may be where a graph takes any size; None for no limit."""
        return None

    def pixels_per_latent(self, source: Source) -> int:
        """How many pixels wide a latent pixel is: 8 for a VAE of four levels."""
        return int(2 ** (len(source.vae.config.block_out_channels) - 1))

    def image_size(self, source: Source) -> tuple[int, int]:
        """(height, width) in pixels at the checkpoint's own size."""
        _, height, width = self.latent_shape(source)
        factor = self.pixels_per_latent(source)
        return height * factor, width * factor

    def full_precision(self, source: Source) -> tuple[str, ...]:
        """Components of the package that overflow in FP16: every engine computes them in FP32."""
        return ()

    def zeros_for_no_prompt(self, source: Source) -> bool:
        """Whether guidance without a negative prompt sees zeros in place of the empty prompt's embeddings."""
        return False

    def pipeline_options(self, source: Source) -> dict[str, Any]:
        """Arguments of diffusers' pipeline beside the parts and the scheduler."""
        return {}

    # Prompts

    def encode_prompts(self, source: Source, prompts: Sequence[str | None]) -> Conditioning:
        """What the denoiser is told of each prompt, as diffusers' pipeline makes it; float32 on the CPU.

        Args:
            source: the checkpoint; text encoders compute where they are.
            prompts: None is the unconditional half of guidance where the user gives no negative prompt, which is not
                the empty prompt in every family.
        """
        found: dict[str, list[Tensor]] = {}
        for encoder in self.text_encoders:
            for name, tensor in encoder.encode(source, [prompt or "" for prompt in prompts]).items():
                found.setdefault(name, []).append(tensor)
        return Conditioning({name: torch.cat(parts, dim=-1) for name, parts in found.items()})

    # The denoiser in torch

    @abstractmethod
    def owns(self, denoiser: nn.Module) -> bool:
        """Whether this is a denoiser of the family."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One call as the pipeline makes it: latents [B, C, h, w], timesteps f32 [B] or [], of B prompts."""

    @abstractmethod
    def time_tables(self, denoiser: nn.Module, timesteps: Tensor) -> dict[str, Tensor]:
        """What the denoiser makes of the timesteps alone, f32 [T, ...] by name, computed in FP32.

        Raises:
            SdqError: the time path is of a form that is not supported.
        """

    @abstractmethod
    def use_tables(self, denoiser: nn.Module, tables: Mapping[str, Tensor], state: StepState) -> None:
        """Put the tables, looked up by the steps of `state`, in the place of the time path; in place.

        What is left of the time path has no parameters: training does not touch it.
        """

    @abstractmethod
    def quantizable_layers(self, denoiser: nn.Module) -> dict[str, str]:
        """Path of each Conv2d and Linear that the denoiser's graph computes at every step -> the tensor that it reads.

        The name of the tensor says no more than which layers read the same one. Layers that are precomputed, by step
        or by prompt, are not among them.
        """

    # Graphs

    @abstractmethod
    def capture_denoiser(
        self, denoiser: nn.Module, latent_shape: tuple[int, int, int], tokens: int, multiple: int = 0
    ) -> ir.Model:
        """The denoiser's graph: ``sample`` f32 [2*batch, C, h, w], ``timestep``, then the conditioning's names.

        Args:
            denoiser: FP32, its time path in place.
            latent_shape: C, h, w; an inpainting denoiser's sample has its extra channels beside C.
            tokens: L.
            multiple: `latent_multiple`, to leave height and width free; 0 for those of `latent_shape` alone.
        """

    @abstractmethod
    def cuts(self, tables: Mapping[str, Tensor]) -> GraphCuts:
        """Passes that divide the captured denoiser, by the tables of `time_tables`."""
