"""`Family`: everything that differs between model families, behind one door. One file a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import NEGATIVE_OUTPUT, TEXT_OUTPUT, CallDefaults
from sdq_export.conditioning import Conditioning
from sdq_export.families.text import padded_length
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
        wrap: the encoder and how many layers to skip -> the module that gives the outputs, a tuple, for ``input_ids``
            int64 [n, L].
        max_length: L; None for the tokenizer's own.
        length_of: the tokenizer whose own length is taken; None for `tokenizer`.
        clip: whether it is CLIP's: prompts may pass through it in chunks, and skip its last layers.
    """

    component: str
    tokenizer: str
    outputs: tuple[str, ...]
    wrap: Callable[..., nn.Module]
    max_length: int | None = None
    length_of: str | None = None
    clip: bool = True

    def length(self, source: Source) -> int:
        """L, the tokens of a padded chunk."""
        return self.max_length or padded_length(source, self.length_of or self.tokenizer, self.component)

    def chunks(self, source: Source) -> int:
        """How many chunks of L tokens a prompt has."""
        return source.text.prompt_chunks if self.clip else 1

    def skipped(self, source: Source) -> int:
        """How many of its last layers prompts are not passed through."""
        return source.text.clip_skip if self.clip else 0

    def output_names(self, source: Source) -> tuple[str, ...]:
        """`outputs` and, where prompts skip layers, the embeddings of negative prompts."""
        return (*self.outputs, NEGATIVE_OUTPUT) if self.skipped(source) else self.outputs

    def module(self, source: Source, encoder: nn.Module) -> nn.Module:
        """What is captured of an encoder: ``input_ids`` int64 [n, L] to the outputs of `output_names`.

        Raises:
            SdqError: it has no more layers than prompts ought to skip.
        """
        skipped, config = self.skipped(source), cast(Any, encoder).config
        if not skipped:
            return self.wrap(encoder)
        if skipped >= config.num_hidden_layers:
            raise SdqError(
                f"clip_skip is {skipped}, and the {self.component} of {source.model} has {config.num_hidden_layers} "
                "layers.",
                f"Give {config.num_hidden_layers - 1} or less.",
            )
        return self.wrap(encoder, skipped)

    def token_ids(self, source: Source, prompts: Sequence[str]) -> Tensor:
        """int64 [n, L], padded and cut; of several chunks the first."""
        return self.chunk_ids(source, prompts)[:, 0]

    def chunk_ids(self, source: Source, prompts: Sequence[str]) -> Tensor:
        """int64 [n, chunks, L], by the tokenizer that the package gets."""
        from sdq_export.tokenizer import prompt_tokenizer

        tokenizer = prompt_tokenizer(source, self)
        rows = [torch.from_numpy(tokenizer.encode(prompt, warn=False).ids) for prompt in prompts]
        return torch.stack(rows) if rows else torch.empty(0, self.chunks(source), self.length(source), dtype=torch.long)

    def cut(self, source: Source, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that are longer than what it takes."""
        from sdq_export.tokenizer import prompt_tokenizer

        tokenizer = prompt_tokenizer(source, self)
        return [prompt for prompt in prompts if not tokenizer.fits(prompt)]

    def encode(self, source: Source, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The outputs by name for each prompt's first chunk, computed on the encoder's device; float32 on the CPU."""
        return self._run(source, self.token_ids(source, prompts))

    def embed(self, source: Source, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """What the denoiser is told of each prompt, by name: float32 [n, chunks*L, D], [n, P], on the CPU.

        Args:
            source: the checkpoint.
            prompts: None is a negative prompt, which is empty.
        """
        rows = self.chunk_ids(source, [prompt or "" for prompt in prompts])
        chunks = [self._run(source, rows[:, index]) for index in range(rows.shape[1])]
        # one vector a prompt comes from its first chunk
        joined = {
            name: torch.cat([chunk[name] for chunk in chunks], dim=1) if first.ndim == 3 else first
            for name, first in chunks[0].items()
        }
        if (negative := joined.pop(NEGATIVE_OUTPUT, None)) is not None:
            absent = torch.tensor([prompt is None for prompt in prompts])[:, None, None]
            joined[TEXT_OUTPUT] = torch.where(absent, negative, joined[TEXT_OUTPUT])
        return joined

    @torch.no_grad()
    def _run(self, source: Source, ids: Tensor) -> dict[str, Tensor]:
        """The outputs by name for token ids [n, L]."""
        encoder = source.part(self.component)
        wrapped = self.module(source, encoder)
        parts = [wrapped(part.to(encoder.device)) for part in ids.split(_TEXT_BATCH)]
        joined = (torch.cat(list(each)).float().cpu() for each in zip(*parts, strict=True))
        return dict(zip(self.output_names(source), joined, strict=True))


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
        inpainting_guidance: `default_guidance` of the inpainting pipeline, where that has another.
        call_defaults: what calls of its image-to-image and inpainting pipelines take.
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
    inpainting_guidance: ClassVar[float | None] = None
    call_defaults: ClassVar[CallDefaults]
    blocks: ClassVar[tuple[str, ...]]

    # The checkpoint

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Names of diffusers' pipelines whose checkpoints are of the family."""
        return (self.pipeline, self.inpainting_pipeline) if self.inpainting_pipeline else (self.pipeline,)

    def fits(self, folder: Path, index: Mapping[str, Any]) -> bool:
        """Whether the checkpoint in this folder, of this model_index.json, is of the family."""
        return index.get("_class_name") in self.pipelines

    def guidance(self, source: Source) -> float:
        """What the pipeline that the checkpoint names guides by, where the caller names nothing."""
        inpaints = source.index.get("_class_name") == self.inpainting_pipeline
        return self.inpainting_guidance if inpaints and self.inpainting_guidance else self.default_guidance

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
            for name, tensor in encoder.embed(source, prompts).items():
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
