"""The packaged tokenizer gives CLIPTokenizer's ids, padding and truncation included, whatever the prompt."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from sdq_engines.package.schema import TextInfo
from sdq_engines.runtime.text import PromptTokenizer, load_tokenizer
from sdq_export.source import Source, load_source
from sdq_export.tokenizer import tokenizer_json

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
    info = source.family.text_encoders[0].info()
    for caption in CAPTIONS:
        ids = packaged.encode(caption).ids
        assert len(ids) == info.max_length
        assert ids[0] == info.bos_token_id
        assert info.eos_token_id in ids


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_textual_inversion_of_several_vectors_is_written_out(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """As saved with the pipeline; Stable Diffusion 3's pipeline knows no textual inversions, so there it is not."""
    source = load_source(tiny(kind))
    pipeline = source.pipeline(source.scheduler)
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    if kind == "sd3":
        tokenizer.add_tokens(["<dog>", "<dog>_1"])
    else:
        encoder = copy.deepcopy(pipeline.text_encoder)
        vectors = torch.randn(4, encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
        pipeline.load_textual_inversion({"<dog>": vectors}, tokenizer=tokenizer, text_encoder=encoder)
        pipeline.load_textual_inversion({"<one>": vectors[:1]}, tokenizer=tokenizer, text_encoder=encoder)
    source = copy.copy(source)
    source._parts = {**source._parts, "tokenizer": tokenizer}
    first = source.family.text_encoders[0]
    info = first.info()
    assert info.written_out == ({} if kind == "sd3" else {"<dog>": "<dog> <dog>_1 <dog>_2 <dog>_3"})
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer_json(tokenizer, first.length), "utf-8")
    packaged = PromptTokenizer(load_tokenizer(file), TextInfo.model_validate_json(info.model_dump_json()))
    prompts = ["a <dog> circle", "<dog>", "<DOG> red", "<one> <dog> <dog>", "<dog>_1 red", "a<dog>b", "a red circle"]
    written = [p if kind == "sd3" else pipeline.maybe_convert_prompt(p, tokenizer) for p in prompts]
    wanted = tokenizer(written, padding="max_length", max_length=16, truncation=True).input_ids
    assert [packaged.encode(prompt).ids[0].tolist() for prompt in prompts] == wanted
    assert first.token_ids(prompts).tolist() == wanted
