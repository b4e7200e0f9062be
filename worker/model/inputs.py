"""Turns a plan into tensors: token ids, positions, slots, block tables, and which rows need logits.

Vectorised over rows; per entry there is one small loop, since a plan is made of Python objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.worker.engine.plan import BatchPlan, PlanEntry
from ellm.worker.model.halves import Half, place_rows
from ellm.worker.model.sequences import ResidentSequences, SequenceState
from ellm.worker.model.staging import to_device


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One plan as tensors. R rows, S entries, n selected rows."""

    token_ids: Tensor  # [R] int64
    meta: AttentionMeta
    states: list[SequenceState]  # [S]
    rows: Tensor | None  # [n] int64: rows that keep the LM head; None: all R
    selected: npt.NDArray[np.int64] | None  # the same on the host: nothing is read back to learn it
    # Positions within the n selected rows.
    sample_rows: Tensor | None  # [entries that sample]; None: all n, in order
    scored: tuple[tuple[int, int, int], ...]  # (entry, first selected row, count) with prompt logprobs


class InputBuilder:
    """Builds one step's tensors; owns the last sampled token of every resident sequence."""

    def __init__(self, sequences: ResidentSequences, block_size: int, device: torch.device) -> None:
        self._sequences = sequences
        self._block_size = block_size
        self._device = device
        self._last_tokens = torch.zeros(sequences.num_rows, dtype=torch.int64, device=device)

    def build(self, plan: BatchPlan, *, may_fuse: bool = False) -> StepInputs:
        """Tensors of `plan`, whose sequences must be resident. Reads the entries' live tables.

        may_fuse: rows of holes may share a launch of attention with decode rows."""
        entries = plan.entries
        states = [self._sequences[e.seq_id] for e in entries]
        for entry, state in zip(entries, states, strict=True):
            needed = -(-(entry.start + entry.num_tokens) // self._block_size)
            if needed > state.num_blocks:
                self._sequences.extend(state, entry.block_ids, needed)
        table_rows = np.array([s.row for s in states], dtype=np.int64)
        starts = np.array([e.start for e in entries], dtype=np.int64)
        counts = np.array([e.num_tokens for e in entries], dtype=np.int64)
        cu = np.zeros(len(entries) + 1, dtype=np.int32)
        np.cumsum(counts, out=cu[1:])
        num_recompute = sum(e.recompute for e in entries)
        meta = self._meta(table_rows, starts, counts, cu, num_recompute, may_fuse)
        selected, sample_rows, scored = self._select(entries, cu)
        return StepInputs(
            token_ids=self._token_ids(entries, table_rows, cu),
            meta=meta,
            states=states,
            rows=None if selected is None else self._tensor(selected),
            selected=selected,
            sample_rows=sample_rows,
            scored=scored,
        )

    def halves(
        self, plan: BatchPlan, inputs: StepInputs, sides: npt.NDArray[np.int64]
    ) -> tuple[tuple[Half, Half], Tensor]:
        """The inputs of `plan` in two, and the order that brings their selected rows, one half's after the
        other's, back into that of `inputs.rows`. sides [S]: 0 or 1 for each entry."""
        entries = plan.entries
        table_rows = np.array([s.row for s in inputs.states], dtype=np.int64)
        starts = np.array([e.start for e in entries], dtype=np.int64)
        counts = np.array([e.num_tokens for e in entries], dtype=np.int64)
        placed, order = place_rows(np.repeat(sides, counts), inputs.selected)
        halves = []
        for side, (rows, selected_rows) in enumerate(placed):
            own = np.flatnonzero(sides == side)
            cu = np.zeros(len(own) + 1, dtype=np.int32)
            np.cumsum(counts[own], out=cu[1:])
            num_recompute = sum(entries[i].recompute for i in own)
            halves.append(
                Half(
                    inputs.token_ids.index_select(0, self._tensor(rows)),
                    self._meta(
                        table_rows[own], starts[own], counts[own], cu, num_recompute, inputs.meta.may_fuse
                    ),
                    None if selected_rows is None else self._tensor(selected_rows),
                )
            )
        first, second = halves
        return (first, second), self._tensor(order)

    def remember(self, states: list[SequenceState], tokens: Tensor) -> None:
        """Keep tokens [n] int64, sampled for `states`: the next plan may name them without their ids."""
        if self._last_tokens.shape[0] < self._sequences.num_rows:
            grown = self._last_tokens.new_zeros(self._sequences.num_rows)
            grown[: self._last_tokens.shape[0]] = self._last_tokens
            self._last_tokens = grown
        self._last_tokens[self._tensor(np.array([s.row for s in states], dtype=np.int64))] = tokens

    def _meta(
        self,
        table_rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        cu: npt.NDArray[np.int32],
        num_recompute: int,
        may_fuse: bool,
    ) -> AttentionMeta:
        tables, block_size, num_entries = self._sequences.block_tables, self._block_size, len(starts)
        num_rows = int(cu[-1])
        row_entry = np.arange(num_entries, dtype=np.int32)
        positions, row_tables, num_decode = starts, table_rows, num_entries
        if num_rows != num_entries:
            row_entry = np.repeat(row_entry, counts)
            positions = np.arange(num_rows) + np.repeat(starts - cu[:-1], counts)
            row_tables = table_rows[row_entry]
            num_decode = int(np.argmax(counts != 1))
        slots = tables[row_tables, positions // block_size].astype(np.int64)
        slots *= block_size
        slots += positions % block_size
        kv_lens = (starts + counts).astype(np.int32)
        max_kv_len = int(kv_lens.max())
        return AttentionMeta(
            cu_seqlens_q=self._tensor(cu),
            kv_lens=self._tensor(kv_lens),
            block_tables=self._tensor(tables[table_rows, : -(-max_kv_len // block_size)]),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(slots),
            num_decode=num_decode,
            max_kv_len=max_kv_len,
            row_entry=self._tensor(row_entry),
            num_recompute=num_recompute,
            may_fuse=may_fuse,
        )

    def _token_ids(
        self, entries: tuple[PlanEntry, ...], table_rows: npt.NDArray[np.int64], cu: npt.NDArray[np.int32]
    ) -> Tensor:
        ids = np.empty(int(cu[-1]), dtype=np.int64)
        unread: list[int] = []
        for i, entry in enumerate(entries):
            if entry.token_ids:
                ids[cu[i] : cu[i + 1]] = entry.token_ids
            else:
                assert entry.num_tokens == 1, "only a decode row may wait for the step before"
                unread.append(i)
        tokens = self._tensor(ids)
        if unread:
            last = self._last_tokens[self._tensor(table_rows[unread])]
            tokens[self._tensor(cu[unread].astype(np.int64))] = last
        return tokens

    def _select(
        self, entries: tuple[PlanEntry, ...], cu: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int64] | None, Tensor | None, tuple[tuple[int, int, int], ...]]:
        """Which rows keep the LM head; see StepInputs."""
        samples = np.array([e.samples for e in entries])
        last_rows = cu[1:] - 1
        sampled = last_rows[samples].astype(np.int64)
        if not any(e.prompt_logprobs for e in entries):
            everything = len(sampled) == int(cu[-1])
            if not len(sampled):
                sampled = np.zeros(1, dtype=np.int64)  # a row nobody reads: layers need not know of none
            return (None if everything else sampled), None, ()
        keep = np.zeros(int(cu[-1]), dtype=bool)
        keep[sampled] = True
        for i, entry in enumerate(entries):
            if entry.prompt_logprobs:
                keep[cu[i] : cu[i + 1]] = True
        place = np.cumsum(keep) - 1  # row -> its place among the selected
        scored = tuple(
            (i, int(place[cu[i]]), e.num_tokens) for i, e in enumerate(entries) if e.prompt_logprobs
        )
        return np.flatnonzero(keep), self._tensor(place[sampled]), scored

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return to_device(array, self._device)
