"""A plan as tensors, against the same built entry by entry in plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import BatchPlan, NewSequence, PlanEntry
from ellm.worker.model.inputs import InputBuilder, StepInputs
from ellm.worker.model.sequences import ResidentSequences

BLOCK = 4
CPU = torch.device("cpu")


@dataclass
class Expected:
    """The same as StepInputs, as lists."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    row_entry: list[int] = field(default_factory=list)
    selected: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # rows
    scored: dict[int, list[int]] = field(default_factory=dict)  # entry -> rows


def naive(entries: list[PlanEntry], last_tokens: dict[int, int]) -> Expected:
    out = Expected()
    row = 0
    for i, entry in enumerate(entries):
        tokens = entry.token_ids or (last_tokens[entry.seq_id],)
        for j in range(entry.num_tokens):
            position = entry.start + j
            out.token_ids.append(tokens[j])
            out.positions.append(position)
            out.slots.append(entry.block_ids[position // BLOCK] * BLOCK + position % BLOCK)
            out.row_entry.append(i)
            is_sampled = entry.samples and j == entry.num_tokens - 1
            if is_sampled:
                out.sampled.append(row)
            if entry.prompt_logprobs:
                out.scored.setdefault(i, []).append(row)
            if is_sampled or entry.prompt_logprobs:
                out.selected.append(row)
            row += 1
    return out


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[PlanEntry], dict[int, int]]:
    counts = sorted(draw(st.lists(st.sampled_from([1, 1, 2, 5, 9]), min_size=1, max_size=6)))
    entries, last = [], {}
    for seq_id, count in enumerate(counts):
        start = draw(st.integers(0, 20))
        num_blocks = -(-(start + count) // BLOCK) + draw(st.integers(0, 2))
        blocks = draw(st.lists(st.integers(0, 99), min_size=num_blocks, max_size=num_blocks))
        samples = draw(st.booleans())
        hidden = count == 1 and samples and draw(st.booleans())
        tokens = () if hidden else tuple(draw(st.integers(0, 999)) for _ in range(count))
        last[seq_id] = draw(st.integers(0, 999))
        scores = draw(st.booleans()) and not hidden
        entries.append(PlanEntry(seq_id, start, count, tokens, blocks, samples, 0, scores))
    return entries, last


def build(entries: list[PlanEntry], last_tokens: dict[int, int]) -> StepInputs:
    sequences = ResidentSequences((), 1000, max_blocks=12, num_rows=2)
    builder = InputBuilder(sequences, BLOCK, CPU)
    for entry in entries:
        sequences.add(NewSequence(entry.seq_id, (1,), (), SamplingParams(), 0))
    states = [sequences[seq_id] for seq_id in last_tokens]
    builder.remember(states, torch.tensor(list(last_tokens.values())))
    rows = sum(e.num_tokens for e in entries)
    return builder.build(BatchPlan(0, tuple(entries), (), (), rows, 0))


@given(plans())
def test_tensors_say_what_the_plan_says(plan: tuple[list[PlanEntry], dict[int, int]]) -> None:
    entries, last_tokens = plan
    want, got = naive(entries, last_tokens), build(entries, last_tokens)
    meta = got.meta
    assert got.token_ids.tolist() == want.token_ids
    assert meta.positions.tolist() == want.positions
    assert meta.slot_mapping.tolist() == want.slots
    assert meta.row_entry.tolist() == want.row_entry
    ends = [e.start + e.num_tokens for e in entries]
    assert meta.kv_lens.tolist() == ends
    assert meta.max_kv_len == max(ends)
    width = -(-max(ends) // BLOCK)
    assert meta.block_tables.shape == (len(entries), width)
    for table, entry, end in zip(meta.block_tables.tolist(), entries, ends, strict=True):
        used = -(-end // BLOCK)
        assert table == entry.block_ids[:used] + [0] * (width - used)
    lengths = (meta.cu_seqlens_q[1:] - meta.cu_seqlens_q[:-1]).tolist()
    assert lengths == [e.num_tokens for e in entries]
    assert all(e.num_tokens == 1 for e in entries[: meta.num_decode])
    assert all(e.num_tokens > 1 for e in entries[meta.num_decode :])


@given(plans())
def test_rows_with_logits(plan: tuple[list[PlanEntry], dict[int, int]]) -> None:
    entries, last_tokens = plan
    want, got = naive(entries, last_tokens), build(entries, last_tokens)
    everything = list(range(len(want.token_ids)))
    selected = everything if got.rows is None else got.rows.tolist()
    if want.selected:
        assert selected == want.selected
    else:
        assert len(selected) == 1  # layers need not know of a step without logits
    sample_rows = list(range(len(selected))) if got.sample_rows is None else got.sample_rows.tolist()
    if want.sampled:
        assert [selected[i] for i in sample_rows] == want.sampled
    for entry, first, count in got.scored:
        assert selected[first : first + count] == want.scored.pop(entry)
    assert not want.scored


def test_dtypes_are_what_the_operations_take() -> None:
    inputs = build([PlanEntry(0, 3, 2, (1, 2), [4, 5], True)], {0: 9})
    meta = inputs.meta
    assert inputs.token_ids.dtype == meta.positions.dtype == meta.slot_mapping.dtype == torch.int64
    for tensor in (meta.cu_seqlens_q, meta.kv_lens, meta.block_tables, meta.row_entry):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
