"""A family's text encoders: which ones it has, and each with its tokenizer as a checkpoint brings them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_engines.package.layout import tokenizer_file
from sdq_engines.package.schema import NEGATIVE_OUTPUT, TEXT_OUTPUT, TextInfo
from sdq_engines.runtime.text import PromptTokenizer
from sdq_export.families.component import ComponentExport, RoundingCost
from sdq_export.families.text import padded_length, written_out
from sdq_export.parts import Parts
from sdq_export.tokenizer import tokenizer_json

__all__ = ["EncoderSpec", "TextEncoder"]

_TEXT_BATCH = 64
"""Prompts that go through a text encoder together."""

_ROUNDING_LIMIT = 0.03

_made: WeakKeyDictionary[Any, dict[tuple[str, bool], PromptTokenizer]] = WeakKeyDictionary()


@dataclass(frozen=True)
class EncoderSpec:
    """One of a family's text encoders, whichever the checkpoint.

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


class TextEncoder:
    """A text encoder of a checkpoint.

    Args:
        spec: which it is.
        checkpoint: brings its weights and its tokenizer.
        pipeline: diffusers' pipeline, which may write out textual inversions of several vectors.
    """

    def __init__(self, spec: EncoderSpec, checkpoint: Parts, pipeline: str) -> None:
        self.spec, self.checkpoint, self.pipeline = spec, checkpoint, pipeline
        self.component, self.tokenizer = spec.component, spec.tokenizer

    @property
    def length(self) -> int:
        """L, the tokens of a padded chunk."""
        spec = self.spec
        return spec.max_length or padded_length(self.checkpoint, spec.length_of or spec.tokenizer, spec.component)

    @property
    def chunks(self) -> int:
        """How many chunks of L tokens a prompt has."""
        return self.checkpoint.text.prompt_chunks if self.spec.clip else 1

    @property
    def skipped(self) -> int:
        """How many of its last layers prompts are not passed through."""
        return self.checkpoint.text.clip_skip if self.spec.clip else 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives; where prompts skip layers, the embeddings of negative prompts too."""
        return (*self.spec.outputs, NEGATIVE_OUTPUT) if self.skipped else self.spec.outputs

    def module(self, encoder: nn.Module) -> nn.Module:
        """What is captured of an encoder: ``input_ids`` int64 [n, L] to the tuple of `outputs`.

        Raises:
            SdqError: it has no more layers than prompts ought to skip.
        """
        skipped, config = self.skipped, cast(Any, encoder).config
        if not skipped:
            return self.spec.wrap(encoder)
        if skipped >= config.num_hidden_layers:
            raise SdqError(
                f"clip_skip is {skipped}, and the {self.component} of {self.checkpoint.model} has "
                f"{config.num_hidden_layers} layers.",
                f"Give {config.num_hidden_layers - 1} or less.",
            )
        return self.spec.wrap(encoder, skipped)

    def export(self) -> ComponentExport:
        """How it becomes a component of the package; it is given token ids, the empty prompt's first."""
        return ComponentExport(
            name=self.component,
            part=self.component,
            module=self.module,
            inputs={"input_ids": torch.zeros(2, self.length, dtype=torch.int64)},
            outputs=self.outputs,
            rounding=RoundingCost(
                "--text-encoder",
                "the error of {weights}, over the distance of a prompt from the empty one,",
                _ROUNDING_LIMIT,
                self._rounding_error,
            ),
            tokenizer=self.tokenizer,
            key=(self.spec.wrap,),
        )

    def tokenizer_json(self) -> str:
        """Its tokenizer in the format of `tokenizers`, padding and truncation as the pipeline uses it.

        Raises:
            SdqError: its ids cannot be reproduced.
        """
        return tokenizer_json(self.checkpoint.part(self.tokenizer), self.length)

    def info(self) -> TextInfo:
        """What the manifest says about its tokenizer."""
        tokenizer = self.checkpoint.part(self.tokenizer)
        return TextInfo(
            component=self.component,
            tokenizer=tokenizer_file(self.tokenizer),
            max_length=self.length,
            chunks=self.chunks,
            clip_skip=self.skipped,
            pad_token_id=int(tokenizer.pad_token_id),
            bos_token_id=-1 if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id),
            eos_token_id=int(tokenizer.eos_token_id),
            written_out=written_out(self.pipeline, tokenizer),
        )

    def prompt_tokenizer(self) -> PromptTokenizer:
        """The packaged tokenizer as the runtime reads it: one way from a prompt to its tokens.

        Raises:
            SdqError: its ids cannot be reproduced.
        """
        info = self.info()
        made = _made.setdefault(self.checkpoint.part(self.tokenizer), {})
        key = info.model_dump_json(), self.checkpoint.text.prompt_chunks > 1
        if key not in made:
            made[key] = PromptTokenizer(Tokenizer.from_str(self.tokenizer_json()), info, breaks=key[1])
        return made[key]

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """int64 [n, L], padded and cut; of several chunks the first."""
        return self.chunk_ids(prompts)[:, 0]

    def chunk_ids(self, prompts: Sequence[str]) -> Tensor:
        """int64 [n, chunks, L], by the tokenizer that the package gets."""
        tokenizer = self.prompt_tokenizer()
        rows = [torch.from_numpy(tokenizer.encode(prompt, warn=False).ids) for prompt in prompts]
        return torch.stack(rows) if rows else torch.empty(0, self.chunks, self.length, dtype=torch.long)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that are longer than what it takes."""
        tokenizer = self.prompt_tokenizer()
        return [prompt for prompt in prompts if not tokenizer.fits(prompt)]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The outputs by name for each prompt's first chunk, computed on the encoder's device; float32 on the CPU."""
        return self._run(self.token_ids(prompts))

    def embed(self, prompts: Sequence[str | None]) -> dict[str, Tensor]:
        """What the denoiser is told of each prompt, by name: float32 [n, chunks*L, D], [n, P], on the CPU.

        Args:
            prompts: None is a negative prompt, which is empty.
        """
        rows = self.chunk_ids([prompt or "" for prompt in prompts])
        chunks = [self._run(rows[:, index]) for index in range(rows.shape[1])]
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
    def _rounding_error(self, rounded: nn.Module, whole: nn.Module, tokens: Tensor) -> tuple[float, dict[str, Any]]:
        """The error of the outputs over their distance from the empty prompt's, the worst of them, and each.

        That distance is what guidance amplifies; the embeddings' own norm may be one large number that no prompt
        changes.
        """
        errors = {}
        for name, output, found in zip(self.outputs, whole(tokens), rounded(tokens), strict=True):
            told = output[1:] - output[:1]
            errors[name] = float((found - output)[1:].norm() / told.norm().clamp_min(1e-12))
        return max(errors.values()), {"outputs": errors}

    @torch.no_grad()
    def _run(self, ids: Tensor) -> dict[str, Tensor]:
        """The outputs by name for token ids [n, L]."""
        encoder = self.checkpoint.part(self.component)
        wrapped = self.module(encoder)
        parts = [wrapped(part.to(encoder.device)) for part in ids.split(_TEXT_BATCH)]
        joined = (torch.cat(list(each)).float().cpu() for each in zip(*parts, strict=True))
        return dict(zip(self.outputs, joined, strict=True))
