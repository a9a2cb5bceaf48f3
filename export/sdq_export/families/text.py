"""Text encoders as the pipelines use them: the module that is captured gives what the denoiser is told, no more.

With `skip`, diffusers' `clip_skip`, prompts are embedded by an earlier layer, and one more output, the last one, is
what negative prompts are embedded as: diffusers passes them through all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.conditioning import TEXT_INPUT
from sdq_export.loading import naming

if TYPE_CHECKING:
    from sdq_export.source import Source

__all__ = [
    "LastHiddenState",
    "PenultimateAndPooled",
    "PenultimateHiddenState",
    "check_text_encoders",
    "padded_length",
    "write_out_vectors",
]

_NO_LENGTH = 10**20
"""A tokenizer whose configuration says no length says 10^30."""


class LastHiddenState(nn.Module):
    """CLIP's text model or T5's: ``input_ids`` int64 [n, L] to its normalized last hidden state [n, L, D].

    Args:
        text_encoder: of transformers.
        skip: of CLIP's, how many layers to leave out before the normalization.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        if not self.skip:
            return (self.text_encoder(input_ids, return_dict=False)[0],)
        output = self.text_encoder(input_ids, output_hidden_states=True)
        model = getattr(self.text_encoder, "text_model", self.text_encoder)
        return model.final_layer_norm(output.hidden_states[-1 - self.skip]), output.last_hidden_state


class PenultimateHiddenState(nn.Module):
    """CLIP's text model: ``input_ids`` int64 [n, L] to the input of its last layer [n, L, D], not normalized.

    Args:
        text_encoder: of transformers.
        skip: how many more layers to leave out.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        return (hidden[-2 - self.skip], hidden[-2]) if self.skip else (hidden[-2],)


class PenultimateAndPooled(nn.Module):
    """CLIP's text model with projection: the same [n, L, D], and the projected end mark of the last layer [n, P].

    Args:
        text_encoder: of transformers.
        skip: how many more layers to leave out of the first.
    """

    def __init__(self, text_encoder: Any, skip: int = 0) -> None:
        super().__init__()
        self.text_encoder, self.skip = text_encoder, skip

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.text_encoder(input_ids, output_hidden_states=True)
        hidden, pooled = output.hidden_states, output.text_embeds
        return (hidden[-2 - self.skip], pooled, hidden[-2]) if self.skip else (hidden[-2], pooled)


def padded_length(source: Source, tokenizer: str, component: str) -> int:
    """L, the tokens of a padded prompt, begin and end marks included: what the tokenizer says, or else the encoder.

    Args:
        source: the checkpoint.
        tokenizer: whose `model_max_length` the pipeline pads to.
        component: the text encoder, for the number of its positions.

    Raises:
        SdqError: the tokenizer says another thing than a length, or more than the encoder has positions.
    """
    said = source.part(tokenizer).model_max_length
    positions = int(source.part(component).config.max_position_embeddings)
    if not isinstance(said, int | float) or said < 3 or positions < said < _NO_LENGTH:
        raise SdqError(
            f"{tokenizer}/tokenizer_config.json of {source.model} has model_max_length = {said!r}; the {component} has "
            f"{positions} positions.",
            f"Set model_max_length to {positions}, or leave it out.",
        )
    return int(said) if said < _NO_LENGTH else positions


def write_out_vectors(source: Source, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts in which the token of a textual inversion of several vectors stands for all of them.

    Where the family's pipeline of diffusers does so (its `maybe_convert_prompt`): ``<dog>`` becomes
    ``<dog> <dog>_1 <dog>_2`` if the tokenizer has these.
    """
    import diffusers
    from diffusers.loaders import TextualInversionLoaderMixin

    if not issubclass(getattr(diffusers, source.family.pipeline), TextualInversionLoaderMixin):
        return list(prompts)
    written: list[str] = TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)
    return written


def check_text_encoders(source: Source, width: Any) -> None:
    """Refuse tokenizers and text encoders that do not belong together, or that cannot encode the empty prompt.

    Args:
        source: the checkpoint.
        width: of the CLIP encoders' embeddings side by side, as the denoiser takes them; a list is left to diffusers.

    Raises:
        SdqError: a tokenizer has more tokens than its encoder has embeddings, the lengths of prompts differ, an
            encoder fails by settings that transformers takes and cannot compute with, or is not the denoiser's.
    """
    lengths, widths = {}, 0
    for encoder in source.family.text_encoders:
        tokenizer, model = source.part(encoder.tokenizer), source.part(encoder.component)
        if len(tokenizer) > model.config.vocab_size:
            raise SdqError(
                f"The {encoder.tokenizer} of {source.model} has {len(tokenizer)} tokens, the {encoder.component} "
                f"embeddings of {model.config.vocab_size}.",
                "Save both from one pipeline, for example after its load_textual_inversion.",
            )
        lengths[encoder.outputs[0], encoder.length(source)] = encoder.tokenizer
        if encoder.max_length is None:  # a T5 of billions of parameters is not run for it
            with naming(f"The {encoder.component} of {source.model}"):
                widths += encoder.encode(source, [""])[TEXT_INPUT].shape[-1]
    if len(lengths) > len({output for output, _ in lengths}):
        said = ", ".join(f"{name} {length}" for (_, length), name in lengths.items())
        raise SdqError(
            f"The tokenizers of {source.model} pad prompts to different lengths ({said}), and their embeddings are "
            "joined side by side.",
            "Set model_max_length in their tokenizer_config.json to one number.",
        )
    if isinstance(width, int) and widths != width:
        raise SdqError(
            f"The text encoders of {source.model} give embeddings of {widths} channels; the {source.family.denoiser} "
            f"takes {width}.",
            "Take all of them from one model.",
        )
