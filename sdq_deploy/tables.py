"""Tables on a terminal, from which nothing is cut: what does not fit is folded."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["new_table"]


def new_table(title: str, texts: Sequence[str], figures: Sequence[str]) -> Table:
    """An empty table that fits 80 columns as well as it can.

    Args:
        title: above it.
        texts: headings of its first columns, which hold words.
        figures: headings of the others, which hold numbers.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in figures:
        table.add_column(heading, overflow="fold", justify="right")
    return table
