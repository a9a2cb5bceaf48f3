"""Prompt files and their split."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdq_deploy.training.prompts import read_prompts, split_prompts, stable_seed
from sdq_engines.errors import SdqError


def test_reads_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Stück Käse\r\n\r\n  a cat \n".encode())
    assert read_prompts(path) == ["ein Stück Käse", "a cat"]


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"caf\xe9\n", "not UTF-8")])
def test_bad_prompt_files_are_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(SdqError, match=words):
        read_prompts(path)


def test_held_out_prompts_are_not_trained_on() -> None:
    prompts = [str(index) for index in range(10)]
    split = split_prompts(prompts, 8, 2)
    assert split.training == tuple(prompts[:8])
    assert split.validation == ("8", "9")
    cycled = split_prompts(prompts, 20, 4)
    assert not set(cycled.training) & set(cycled.validation)
    assert len(cycled.training) == 20


def test_one_prompt_is_enough() -> None:
    split = split_prompts(["a"], 3, 2)
    assert (split.training, split.validation) == (("a",) * 3, ("a",) * 2)


def test_seeds_are_the_same_everywhere() -> None:
    assert stable_seed(0, "training", 3) == stable_seed(0, "training", 3)
    assert len({stable_seed(0, "training", index) for index in range(100)}) == 100
    assert stable_seed(1, 23) != stable_seed(12, 3)
