"""Prompt -> token ids, padded and cut as diffusers' Stable Diffusion pipeline does with CLIP's tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import TextInfo

__all__ = ["PromptTokenizer"]

_logger = logging.getLogger(__name__)


class PromptTokenizer:
    """The package's tokenizer.

    Args:
        path: tokenizer.json.
        info: the length and the special tokens.
    """

    def __init__(self, path: Path, info: TextInfo) -> None:
        from tokenizers import Tokenizer

        self.info = info
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise SdqError(
                f"{path} is not a tokenizer that can be read: {error}.", "Export the package again."
            ) from error
        # The file may carry both; here they follow `info` alone.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """int64 [len(prompts), max_length]: begin mark, tokens, end mark, padding.

        A prompt with more tokens than fit keeps the first ones and the end mark; what was cut is logged as a warning.
        """
        return np.array([self._row(prompt) for prompt in prompts], np.int64).reshape(len(prompts), self.info.max_length)

    def _write_out(self, prompt: str) -> str:
        """The prompt with a token for each vector of a textual inversion, as diffusers' `maybe_convert_prompt`."""
        if not self.info.written_out:
            return prompt
        found = set(self._tokenizer.encode(prompt, add_special_tokens=False).tokens)
        for token, replacement in self.info.written_out.items():
            if token in found:
                prompt = prompt.replace(token, replacement)
        return prompt

    def _row(self, prompt: str) -> list[int]:
        info = self.info
        begin = [info.bos_token_id] if info.bos_token_id >= 0 else []
        prompt = self._write_out(prompt)
        encoded = self._tokenizer.encode(prompt, add_special_tokens=False)
        ids = encoded.ids
        room = info.max_length - len(begin) - 1
        if len(ids) > room:
            _logger.warning(
                "The prompt is longer than the %d tokens that this model takes; the end was cut off: %r",
                info.max_length,
                prompt[encoded.offsets[room][0] :].strip(),
            )
        row = [*begin, *ids[:room], info.eos_token_id]
        return row + [info.pad_token_id] * (info.max_length - len(row))
