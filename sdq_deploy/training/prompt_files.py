"""Prompt lists from files: plain text, or a column of a table (CSV, TSV, JSON lines, Parquet)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdq_engines.errors import SdqError

__all__ = ["COLUMNS", "read_prompts"]

#: Names that are looked for where none is given, in this order.
COLUMNS = ("prompt", "caption", "text")

Rows = list[Mapping[str, Any]]


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file; empty ones are skipped.

    Args:
        path: .csv, .tsv, .jsonl and .parquet are tables; anything else is UTF-8 text, one prompt per line.
        column: of a table; by default the first of `COLUMNS` that there is.

    Raises:
        SdqError: the file is missing or damaged, lacks the column, or holds no prompt.
    """
    try:
        found = _column(path, _READERS[path.suffix.lower()](path), column) if is_table(path) else _lines(path, column)
    except FileNotFoundError as error:
        raise SdqError(
            f"The prompt file {path} does not exist.",
            "Write one prompt per line into a text file, or name the file of a table with a column of prompts.",
        ) from error
    except UnicodeDecodeError as error:
        raise SdqError(
            f"The prompt file {path} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8, one prompt per line."
        ) from error
    except OSError as error:
        raise SdqError(
            f"The prompt file {path} cannot be read: {error.strerror or error}.", "Give a file that may be read."
        ) from error
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise SdqError(f"The prompt file {path} is empty.", "Write one prompt per line.")
    return prompts


def is_table(path: Path) -> bool:
    """Whether the file's name says that it is a table."""
    return path.suffix.lower() in _READERS


def _lines(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise SdqError(
            f"{path} is plain text and has no column {column!r}.", f"Columns are read from {', '.join(_READERS)} files."
        )
    return path.read_text(encoding="utf-8-sig").splitlines()


def _column(path: Path, rows: Rows, column: str | None) -> list[str]:
    """The values of a column; rows that lack it are as good as empty ones."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    chosen = column if column is not None else next((name for name in COLUMNS if name in names), None)
    if rows and (chosen is None or chosen not in names):
        wanted = f"no column {column!r}" if column is not None else f"none of the columns {', '.join(COLUMNS)}"
        raise SdqError(f"{path} has {wanted}; it has {', '.join(names)}.", "Name one: --prompt-column NAME")
    values = [row.get(chosen) for row in rows] if chosen is not None else []
    return [str(value) for value in values if value is not None]


def _csv(path: Path, delimiter: str = ",") -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: value for name, value in row.items() if name is not None}
            for row in csv.DictReader(file, delimiter=delimiter)
        ]


def _json_lines(path: Path) -> Rows:
    rows: Rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SdqError(
                f"Line {number} of {path} is not JSON: {error.msg}.",
                'Write one object per line, for example {"prompt": "a red circle"}.',
            ) from error
        rows.append(row if isinstance(row, dict) else {COLUMNS[0]: row})
    return rows


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise SdqError("Reading Parquet needs pyarrow.", "pip install pyarrow, or save the prompts as CSV.") from error
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        rows: Rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SdqError(
            f"{path} is not a Parquet file: {error}", "Write it again, or save the prompts as CSV."
        ) from error
    return rows


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
