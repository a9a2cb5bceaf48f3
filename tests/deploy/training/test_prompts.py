"""Prompt files and their split."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sdq_deploy.training.prompt_files import read_prompts
from sdq_deploy.training.prompts import split_prompts, stable_seed
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


@pytest.mark.parametrize("name", ["none.txt", "none.csv", "none.parquet"])
def test_a_prompt_file_that_is_not_there_says_what_is_wanted(tmp_path: Path, name: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(SdqError, match=f"The prompt file .*{name} does not exist") as raised:
        read_prompts(tmp_path / name)
    assert "Write one prompt per line into a text file" in raised.value.hint


def write_table(path: Path, column: str = "caption") -> Path:
    """Two prompts, one of them with a comma and quotes, and one row without."""
    rows = [{"id": 1, column: 'a cat, "asleep"'}, {"id": 2, column: None}, {"id": 3, column: "ein Stück Käse"}]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", column], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_reads_a_column_of_a_table(tmp_path: Path, suffix: str) -> None:
    wanted = ['a cat, "asleep"', "ein Stück Käse"]
    assert read_prompts(write_table(tmp_path / f"known{suffix}")) == wanted
    other = write_table(tmp_path / f"other{suffix}", "beschreibung")
    assert read_prompts(other, "beschreibung") == wanted
    with pytest.raises(SdqError, match="it has id, beschreibung") as raised:
        read_prompts(other)
    assert "--prompt-column" in raised.value.hint
    with pytest.raises(SdqError, match="no column 'missing'"):
        read_prompts(other, "missing")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{', "Line 2"),
        ("a.parquet", b"no table", "not a Parquet file"),
        ("a.csv", b"prompt\n\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt\ncaf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SdqError, match=words):
        read_prompts(path)


@pytest.mark.parametrize("name", ["no.txt", "no.csv", "no.jsonl", "no.parquet"])
def test_a_missing_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(SdqError, match="does not exist"):
        read_prompts(tmp_path / name)


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat", encoding="utf-8")
    with pytest.raises(SdqError, match="no column 'prompt'"):
        read_prompts(path, "prompt")


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
