"""Token ids equal those of transformers' CLIP tokenizer, as diffusers calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdq_engines.package.schema import TextInfo
from sdq_engines.runtime.text import PromptTokenizer, load_tokenizer

PROMPTS = [
    "",
    "a red circle",
    "A  Red,circle!! on the left; two stars?",
    "x" * 40,
    "naïve café 红色 circle",
    "circle " * 90,
]


def test_ids_equal_transformers(tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer")
    file = tmp_path / "tokenizer.json"
    theirs.backend_tokenizer.save(str(file))
    info = TextInfo(
        tokenizer="tokenizer/tokenizer.json",
        max_length=theirs.model_max_length,
        pad_token_id=theirs.pad_token_id,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
    )
    tokenizer = PromptTokenizer(load_tokenizer(file), info)
    ours = np.concatenate([tokenizer.encode(prompt).ids for prompt in PROMPTS])
    wanted = theirs(PROMPTS, padding="max_length", max_length=info.max_length, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(ours, wanted.input_ids)
    assert ours.dtype == np.int64
    # The warning names what was cut, as diffusers does.
    untruncated = theirs(PROMPTS[-1]).input_ids
    cut = theirs.decode(untruncated[info.max_length - 1 : -1]).strip()
    assert f"cut off: '{cut}'" in caplog.text
