"""The source's CLIP tokenizer as one `tokenizer.json` that the torch-free runtime loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from sdq_engines.errors import SdqError
from sdq_engines.package.layout import tokenizer_file
from sdq_engines.package.schema import TextInfo
from sdq_engines.runtime.text import PromptTokenizer
from sdq_export.families.text import write_out_vectors

if TYPE_CHECKING:
    from sdq_export.families.base import TextEncoder
    from sdq_export.source import Source

__all__ = ["prompt_tokenizer", "text_info", "tokenizer_json"]

_PROBES = ("a red circle", "", "Ünïcödé \U0001f534 \u4e00\u4e8c  it's 12.5%", "word " * 200)


def tokenizer_json(tokenizer: Any, length: int) -> str:
    """The tokenizer with padding and truncation as diffusers' pipeline uses it, in the format of `tokenizers`.

    Args:
        tokenizer: of transformers, CLIPTokenizer for one.
        length: tokens of a padded prompt.

    Raises:
        SdqError: its ids cannot be reproduced.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        backend = convert_slow_tokenizer(tokenizer)
    copied = Tokenizer.from_str(backend.to_str())
    copied.enable_truncation(max_length=length)
    copied.enable_padding(length=length, pad_id=int(tokenizer.pad_token_id), pad_token=tokenizer.pad_token)
    for prompt in _PROBES:
        wanted = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        if copied.encode(prompt).ids != list(wanted):
            raise SdqError(
                f"The tokenizer {type(tokenizer).__name__} cannot be packaged: as one tokenizer.json, which the "
                f"runtime reads, it gives other token ids for {prompt[:20]!r} than in transformers.",
                "Save it again with a current transformers: AutoTokenizer.from_pretrained(FOLDER), save_pretrained.",
            )
    return str(copied.to_str())


def text_info(source: Source, encoder: TextEncoder) -> TextInfo:
    """What the manifest says about a text encoder's tokenizer."""
    tokenizer = source.part(encoder.tokenizer)
    return TextInfo(
        component=encoder.component,
        tokenizer=tokenizer_file(encoder.tokenizer),
        max_length=encoder.length(source),
        chunks=encoder.chunks(source),
        clip_skip=encoder.skipped(source),
        pad_token_id=int(tokenizer.pad_token_id),
        bos_token_id=-1 if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        written_out=_written_out(source, tokenizer),
    )


def _written_out(source: Source, tokenizer: Any) -> dict[str, str]:
    """What diffusers' pipeline makes of each added token alone, where it makes something else of it."""
    tokens = list(tokenizer.added_tokens_encoder)
    pairs = zip(tokens, write_out_vectors(source, tokenizer, tokens), strict=True)
    return {token: written for token, written in pairs if written != token}


_made: WeakKeyDictionary[Any, dict[tuple[str, bool], PromptTokenizer]] = WeakKeyDictionary()


def prompt_tokenizer(source: Source, encoder: TextEncoder) -> PromptTokenizer:
    """The packaged tokenizer of a text encoder, as the runtime reads it: one way from a prompt to its tokens.

    Raises:
        SdqError: its ids cannot be reproduced.
    """
    tokenizer, info = source.part(encoder.tokenizer), text_info(source, encoder)
    made = _made.setdefault(tokenizer, {})
    key = info.model_dump_json(), source.text.prompt_chunks > 1
    if key not in made:
        packaged = Tokenizer.from_str(tokenizer_json(tokenizer, info.max_length))
        made[key] = PromptTokenizer(packaged, info, breaks=key[1])
    return made[key]
