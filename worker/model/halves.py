"""A step in two halves, so that one can compute while the other's sums are under way.

All rows of a sequence, those of its hole included, stay in one half: no row then reads what a row of the
other half writes in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.worker.engine.plan import PlanEntry

Ints = npt.NDArray[np.int64]
LEAST_SHARE = 0.25  # of the rows: a half smaller than that hides too little


@dataclass(frozen=True, slots=True)
class Half:
    """The inputs of one half; R rows of its own."""

    token_ids: Tensor  # [R] int64
    meta: AttentionMeta
    rows: Tensor | None  # [n] int64: rows that keep the LM head, at least one; None: all


def split(entries: Sequence[PlanEntry]) -> Ints | None:
    """0 or 1 for each entry, halves as equal in rows as sequences allow; None where that is too unequal."""
    rows: dict[int, int] = {}
    for entry in entries:
        rows[entry.seq_id] = rows.get(entry.seq_id, 0) + entry.num_tokens
    side: dict[int, int] = {}
    sums = [0, 0]
    for seq_id in sorted(rows, key=lambda s: -rows[s]):  # the order of the plan among equals
        lighter = int(sums[1] < sums[0])
        side[seq_id] = lighter
        sums[lighter] += rows[seq_id]
    if min(sums) < LEAST_SHARE * sum(sums):
        return None
    return np.array([side[entry.seq_id] for entry in entries], dtype=np.int64)


def place_rows(row_sides: Ints, selected: Ints | None) -> tuple[list[tuple[Ints, Ints | None]], Ints]:
    """For each half its rows of the whole batch, and which of them, counted within the half, are selected;
    and the place of each selected row in the selections of both halves, one after the other.

    row_sides [R]: the half of each row. selected [n]: rows of the whole batch; None: all.
    """
    placed: list[tuple[Ints, Ints | None]] = []
    chosen = np.arange(len(row_sides)) if selected is None else selected
    order = np.empty(len(chosen), dtype=np.int64)
    before = 0
    for side in (0, 1):
        rows = np.flatnonzero(row_sides == side)
        own = np.flatnonzero(row_sides[chosen] == side)
        order[own] = before + np.arange(len(own))
        within: Ints | None = None
        if selected is not None:
            within = np.searchsorted(rows, selected[own])
            if not len(own):
                within = np.zeros(1, dtype=np.int64)  # a row nobody reads: layers need not know of none
        placed.append((rows, within))
        before += len(rows) if within is None else len(within)
    return placed, order
