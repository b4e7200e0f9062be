"""Rows of a result as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.loadtest.result import Row


def text_table(rows: Sequence[Row]) -> str:
    """All columns that any row has, in order of first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
