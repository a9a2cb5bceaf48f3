"""Weights and BREAK in prompts, and how a prompt is divided into chunks of tokens."""

from __future__ import annotations

import logging

import pytest

from sdq_engines.errors import SdqError
from sdq_engines.package.schema import TextInfo
from sdq_engines.runtime.text import PromptTokenizer
from sdq_engines.runtime.weighting import parse_weights, split_breaks
from tests.engines.packages import WORDS, tokenizer

BEGIN, END = len(WORDS) + 1, len(WORDS) + 2


def weights(prompt: str) -> list[tuple[str, float]]:
    """Of a prompt in one chunk."""
    (chunk,) = parse_weights(prompt)
    return [(fragment.text, round(fragment.weight, 4)) for fragment in chunk]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", []),
        ("normal text", [("normal text", 1.0)]),
        # the examples of the web UI's own documentation
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("((word))", [("word", 1.21)]),
        ("[word]", [("word", 0.9091)]),
        ("(a:-1.5)", [("a", -1.5)]),
        ("(a: 1.2 )b", [("a", 1.2), ("b", 1.0)]),
        ("time: 12:30) ok]", [("time: 12:30) ok]", 1.0)]),
        ("back\\\\slash \\", [("back\\slash ", 1.0)]),
        ("(a\\(b\\):1.2)", [("a(b)", 1.2)]),
    ],
)  # fmt: skip
def test_weights(prompt: str, wanted: list[tuple[str, float]]) -> None:
    assert weights(prompt) == wanted


def test_break_divides_also_within_brackets() -> None:
    assert split_breaks("a BREAK b\nBREAK c BREAKFAST") == ["a", "b", "c BREAKFAST"]
    chunks = parse_weights("a (b BREAK c:1.5) d")
    assert [[(each.text, each.weight) for each in chunk] for chunk in chunks] == [
        [("a ", 1.0), ("b", 1.5)],
        [("c", 1.5), (" d", 1.0)],
    ]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a:1.2.3)", "the weight '1.2.3', which is no number"),
        ("a <lora:style:0.8>", "it loads an adapter"),
        ("a [cat:dog:0.5]", "from step to step"),
        ("a [cat|dog]", "from step to step"),
        ("a cat AND a dog", "combines several prompts"),
    ],
)
def test_what_a_package_cannot_do_is_said(prompt: str, message: str) -> None:
    with pytest.raises(SdqError, match=message):
        parse_weights(prompt)


def made(chunks: int, breaks: bool | None = None, embedding: int = 0, room: int = 4) -> PromptTokenizer:
    """Of words, `room` of them in a chunk; "style" is an embedding of so many vectors."""
    words = tokenizer()
    names = [f"style_{index}" if index else "style" for index in range(embedding)]
    words.add_tokens(names)
    info = TextInfo(
        tokenizer="tokenizer.json", max_length=room + 2, chunks=chunks,
        written_out={"style": " ".join(names)} if names else {},
        pad_token_id=0, bos_token_id=BEGIN, eos_token_id=END,
    )  # fmt: skip
    return PromptTokenizer(words, info, breaks)


def rows(found: PromptTokenizer, prompt: str, weighted: bool = False) -> list[list[str]]:
    """The words of each chunk."""
    tokens = found.encode(prompt, weighted)
    words = []
    for row in tokens.ids.tolist():
        assert row[0] == BEGIN
        assert row.count(END) == 1
        assert len(row) == found.info.max_length
        assert set(row[row.index(END) + 1 :]) <= {0}
        words.append([found._tokenizer.id_to_token(token) for token in row[1 : row.index(END)]])
    return words


def test_chunks() -> None:
    three = made(3)
    assert rows(three, "") == [[], [], []]
    assert rows(three, "red star") == [["red", "star"], [], []]
    assert rows(three, "red " * 6) == [["red"] * 4, ["red"] * 2, []]
    assert rows(three, "red BREAK star") == [["red"], ["star"], []]
    assert rows(three, "BREAK star BREAK") == [[], ["star"], []]
    assert rows(three, "red " * 5 + "BREAK star") == [["red"] * 4, ["red"], ["star"]]


def test_what_does_not_fit_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert rows(made(2), "red " * 4 + "BREAK blue BREAK green star") == [["red"] * 4, ["blue"]]
    assert "2 chunks of 6 tokens" in caplog.text
    assert "cut off: 'green star'" in caplog.text
    caplog.clear()
    assert rows(made(1), "red " * 4 + "star above") == [["red"] * 4]
    assert "longer than the 6 tokens that this model takes; the end was cut off: 'star above'" in caplog.text


def test_an_embedding_stays_together() -> None:
    assert rows(made(2, embedding=3), "red red style star") == [["red", "red"], ["style", "style_1", "style_2", "star"]]
    # diffusers cuts a single chunk where it ends
    assert rows(made(1, embedding=3), "red red style star") == [["red", "red", "style", "style_1"]]
    # one that is longer than a chunk has no other choice
    long = rows(made(2, embedding=6), "style")
    assert long == [["style", "style_1", "style_2", "style_3"], ["style_4", "style_5"]]


def test_break_is_a_word_where_a_package_takes_one_chunk() -> None:
    assert rows(made(1), "red BREAK star") == [["red", "<unk>", "star"]]
    with pytest.raises(SdqError, match="has a BREAK, and this package takes one chunk"):
        made(1).encode("red BREAK star", weighted=True)
    # a T5 beside text encoders that take chunks reads the prompt as one
    assert rows(made(1, breaks=True), "red BREAK star") == [["red", "star"]]


def test_weights_follow_their_tokens() -> None:
    tokens = made(2).encode("(red:1.5) star BREAK [blue]", weighted=True)
    wanted = [[1, 1.5, 1, 1, 1, 1], [1, 1 / 1.1, 1, 1, 1, 1]]
    assert tokens.weights.tolist() == [pytest.approx(row) for row in wanted]
    assert tokens.is_weighted
    assert not made(2).encode("(red:1.5)").is_weighted
