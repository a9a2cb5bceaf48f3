"""The source's CLIP tokenizer as one `tokenizer.json` that the torch-free runtime loads."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from sdq_engines.errors import SdqError

__all__ = ["tokenizer_json"]

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
