"""What the runner remembers of a sequence: rows of block tables, token counts, biases."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import NewSequence
from ellm.worker.model.sequences import LogitBias, ResidentSequences, TokenCounts

TOKENS = st.lists(st.integers(0, 30), max_size=80)


@given(TOKENS, TOKENS, TOKENS)
def test_counts_are_of_outputs_over_the_tokens_of_both(
    prompt: list[int], resumed: list[int], sampled: list[int]
) -> None:
    counts = TokenCounts(prompt, resumed)
    for token in sampled:
        counts.add(token)
    outputs = Counter(resumed + sampled)
    got = dict(zip(counts.ids.tolist(), counts.output_counts.tolist(), strict=True))
    assert got == {token: outputs[token] for token in set(prompt + resumed + sampled)}
    assert len(counts.ids) == len(got)


def test_bans_end_with_min_tokens() -> None:
    sampling = SamplingParams(
        logit_bias=((3, 1.5), (9, -2.0), (1000, 5.0)), min_tokens=4, stop_token_ids=(9, 2000)
    )
    bias = LogitBias(sampling, eos_token_ids=(7,), vocab_size=50)
    early = dict(zip(*(a.tolist() for a in bias.at(3)), strict=True))
    late = dict(zip(*(a.tolist() for a in bias.at(4)), strict=True))
    assert early == {3: 1.5, 9: -np.inf, 7: -np.inf}
    assert late == {3: 1.5, 9: -2.0}


def new(seq_id: int) -> NewSequence:
    return NewSequence(seq_id, (1, 2), (), SamplingParams(), 0)


def test_rows_are_reused_cleared_and_grown() -> None:
    sequences = ResidentSequences((), 100, max_blocks=4, num_rows=2)
    for seq_id in range(5):
        sequences.add(new(seq_id))
        sequences.extend(sequences[seq_id], [10 * seq_id + 1, 10 * seq_id + 2, 99], 2)
    assert sequences.num_rows == 8
    rows = {seq_id: sequences[seq_id].row for seq_id in range(5)}
    assert len(set(rows.values())) == 5
    for seq_id, row in rows.items():
        assert sequences.block_tables[row].tolist() == [10 * seq_id + 1, 10 * seq_id + 2, 0, 0]
    sequences.release(3)
    sequences.release(3)
    assert not sequences.block_tables[rows[3]].any()
    sequences.add(new(7))
    assert sequences[7].row == rows[3]
    assert len(sequences) == 5


def test_a_new_residence_starts_afresh() -> None:
    sequences = ResidentSequences((), 100, max_blocks=4)
    sequences.add(new(1))
    sequences.extend(sequences[1], [5, 6, 7], 3)
    sequences.add(new(1))
    state = sequences[1]
    assert state.num_blocks == 0
    sequences.extend(state, [8], 1)
    assert sequences.block_tables[state.row].tolist() == [8, 0, 0, 0]


def test_a_table_grows_without_reading_what_is_known() -> None:
    sequences = ResidentSequences((), 100, max_blocks=4)
    sequences.add(new(1))
    state = sequences[1]
    sequences.extend(state, [5, 6], 2)
    sequences.extend(state, [5, 6, 7, 8], 3)
    assert sequences.block_tables[state.row].tolist() == [5, 6, 7, 0]
    assert state.num_blocks == 3


def test_only_greedy_sequences_without_features_are_plain() -> None:
    sequences = ResidentSequences((), 100, max_blocks=4)
    features = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=0.0, frequency_penalty=0.1),
        SamplingParams(temperature=0.0, logit_bias=((1, 1.0),)),
        SamplingParams(temperature=0.0, min_tokens=2),
    ]
    for i, sampling in enumerate(features):
        sequences.add(NewSequence(i, (1,), (), sampling, 0))
    assert [sequences[i].plain for i in range(len(features))] == [True, False, False, False, False]
