"""The packaged tokenizer gives CLIPTokenizer's ids, padding and truncation included, whatever the prompt."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from sdq_export.source import Source
from sdq_export.tokenizer import text_info, tokenizer_json

CAPTIONS = [
    "",
    " ",
    "a red circle",
    "A RED   Circle\n\tleft of a blue star.",
    "it's 12.5% of the artist's work, isn't it?",
    "naïve façade, smörgåsbord, ÅNGSTRÖM, ﬁ ligature, e\u0301 combining",
    "中文字符 日本語 한국어",
    "emoji 🔴⬛👩‍🚀🏳️‍🌈 flags",
    "עברית العربية हिन्दी",
    "zero\u200bwidth, nbsp\u00a0, \u202ebidi, \ufeffbom",
    "<|startoftext|> inside <|endoftext|> the prompt",
    "null\x00 and \x7f control \x1b[31m",
    "!!!???...---___(((:weight:1.3)))",
    "word " * 100,
    "x" * 500,
]


def random_captions(count: int) -> list[str]:
    """Strings over all of Unicode but the surrogates."""
    generator = random.Random(0)
    planes = [(0x20, 0x7E), (0xA0, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF)]

    def character() -> str:
        return chr(generator.randint(*generator.choice(planes)))

    return ["".join(character() for _ in range(generator.randint(1, 24))) for _ in range(count)]


@pytest.fixture(scope="module")
def packaged(source: Source) -> Tokenizer:
    """The tokenizer as the runtime loads it."""
    return Tokenizer.from_str(tokenizer_json(source.part("tokenizer"), 16))


def test_ids_are_clip_tokenizers(source: Source, packaged: Tokenizer) -> None:
    captions = CAPTIONS + random_captions(500)
    wanted = source.part("tokenizer")(
        captions, padding="max_length", max_length=source.part("tokenizer").model_max_length, truncation=True
    ).input_ids
    for caption, ids in zip(captions, wanted, strict=True):
        assert packaged.encode(caption).ids == ids, caption


def test_every_encoding_has_the_models_length(source: Source, packaged: Tokenizer) -> None:
    info = text_info(source, source.family.text_encoders[0])
    for caption in CAPTIONS:
        ids = packaged.encode(caption).ids
        assert len(ids) == info.max_length
        assert ids[0] == info.bos_token_id
        assert info.eos_token_id in ids
