"""Text encoders as the pipelines use them: the module that is captured gives what the denoiser is told, no more.

With `skip`, diffusers' `clip_skip`, prompts are embedded by an earlier layer, and one more output, the last one, is
what negative prompts are embedded as: diffusers passes them through all layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sdq_engines.errors import SdqError
from sdq_export.parts import Parts

__all__ = [
    "LastHiddenState",
    "PenultimateAndPooled",
    "PenultimateHiddenState",
    "padded_length",
    "written_out",
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


def padded_length(checkpoint: Parts, tokenizer: str, component: str) -> int:
    """L, the tokens of a padded prompt, begin and end marks included: what the tokenizer says, or else the encoder.

    Args:
        checkpoint: which.
        tokenizer: whose `model_max_length` the pipeline pads to.
        component: the text encoder, for the number of its positions.

    Raises:
        SdqError: the tokenizer says another thing than a length, or more than the encoder has positions.
    """
    said = checkpoint.part(tokenizer).model_max_length
    positions = int(checkpoint.part(component).config.max_position_embeddings)
    if not isinstance(said, int | float) or said < 3 or positions < said < _NO_LENGTH:
        raise SdqError(
            f"{tokenizer}/tokenizer_config.json of {checkpoint.model} has model_max_length = {said!r}; the {component} "
            f"has {positions} positions.",
            f"Set model_max_length to {positions}, or leave it out.",
        )
    return int(said) if said < _NO_LENGTH else positions


def written_out(pipeline: str, tokenizer: Any) -> dict[str, str]:
    """What diffusers' pipeline makes of each added token alone, where it makes something else of it.

    Its `maybe_convert_prompt` writes out a textual inversion of several vectors: ``<dog>`` becomes
    ``<dog> <dog>_1 <dog>_2`` if the tokenizer has these.
    """
    import diffusers
    from diffusers.loaders import TextualInversionLoaderMixin

    if not issubclass(getattr(diffusers, pipeline), TextualInversionLoaderMixin):
        return {}
    tokens = list(tokenizer.added_tokens_encoder)
    pairs = zip(tokens, TextualInversionLoaderMixin().maybe_convert_prompt(tokens, tokenizer), strict=True)
    return {token: written for token, written in pairs if written != token}
