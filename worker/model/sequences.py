"""What a model runner remembers of each resident sequence: its row of the block tables and its sampler state.

Rows are reused; the arrays grow when more sequences are resident than ever before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ellm.worker.api.request import SamplingParams
from ellm.worker.engine.plan import NewSequence
from ellm.worker.model.grammar import Grammars, GrammarState

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class TokenCounts:
    """The distinct tokens of prompt and output of one sequence, with their counts in the output."""

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._index = {token: i for i, token in enumerate(distinct)}
        self._size = len(distinct)
        self._ids: Ints = np.zeros(max(16, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts: Ints = np.zeros_like(self._ids)
        for token in output_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more output token."""
        index = self._index.get(token)
        if index is None:
            index = self._index[token] = self._size
            if index == len(self._ids):
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[index] = token
            self._size += 1
        self._counts[index] += 1

    @property
    def ids(self) -> Ints:
        return self._ids[: self._size]

    @property
    def output_counts(self) -> Ints:
        return self._counts[: self._size]


class LogitBias:
    """Additions to one sequence's logits: its logit_bias, and -inf on what may not end it yet."""

    def __init__(self, sampling: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        bias = {token: value for token, value in sampling.logit_bias if 0 <= token < vocab_size}
        self._plain = _bias_arrays(bias)
        banned = (*eos_token_ids, *sampling.stop_token_ids)
        bias |= {token: -np.inf for token in banned if 0 <= token < vocab_size}
        self._with_bans = _bias_arrays(bias)
        self._min_tokens = sampling.min_tokens

    def at(self, output_index: int) -> tuple[Ints, Floats]:
        """(token ids, additions) for the output token of this index."""
        return self._with_bans if output_index < self._min_tokens else self._plain


def _bias_arrays(bias: dict[int, float]) -> tuple[Ints, Floats]:
    return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)


class SequenceState:
    """One resident sequence."""

    __slots__ = (
        *("bias", "choice_index", "counts", "grammar"),
        *("num_blocks", "plain", "prompt_ids", "row", "sampling"),
    )

    def __init__(
        self,
        row: int,
        new: NewSequence,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        grammar: GrammarState | None = None,
    ) -> None:
        sampling = new.sampling
        self.row = row
        self.num_blocks = 0  # of its table, already in the row
        self.sampling = sampling
        self.choice_index = new.choice_index
        self.prompt_ids = new.prompt_ids
        self.counts = TokenCounts(new.prompt_ids, new.output_ids) if sampling.penalises else None
        self.bias: LogitBias | None = None
        if sampling.logit_bias or sampling.min_tokens:
            self.bias = LogitBias(sampling, eos_token_ids, vocab_size)
        self.grammar = grammar
        # Greedy and nothing else: an argmax does.
        adjusts = self.counts is not None or self.bias is not None or grammar is not None
        self.plain = sampling.greedy and not adjusts and sampling.logprobs is None


class ResidentSequences:
    """All resident sequences by seq_id, and their block tables as rows of one array."""

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_blocks: int,
        num_rows: int = 64,
    ) -> None:
        self.grammars: Grammars | None = None
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._states: dict[int, SequenceState] = {}
        self._free = list(range(num_rows - 1, -1, -1))
        self.block_tables: npt.NDArray[np.int32] = np.zeros((num_rows, max_blocks), dtype=np.int32)

    def __getitem__(self, seq_id: int) -> SequenceState:
        return self._states[seq_id]

    def __len__(self) -> int:
        return len(self._states)

    @property
    def num_rows(self) -> int:
        return len(self.block_tables)

    def add(self, new: NewSequence) -> None:
        """Begin a residence; an earlier one of the same sequence ends."""
        self.release(new.seq_id)
        if not self._free:
            size = self.num_rows
            self.block_tables = np.concatenate((self.block_tables, np.zeros_like(self.block_tables)))
            self._free = list(range(2 * size - 1, size - 1, -1))
        row = self._free.pop()
        grammar, state = new.sampling.grammar, None
        if grammar is not None:
            assert self.grammars is not None, "a grammar came to a runner without grammars"
            state = self.grammars.begin(grammar, new.output_ids)
        self._states[new.seq_id] = SequenceState(row, new, self._eos_token_ids, self._vocab_size, state)

    def release(self, seq_id: int) -> None:
        """End a residence; unknown ids are ignored (a sequence may be released before its first plan)."""
        state = self._states.pop(seq_id, None)
        if state is not None:
            self.block_tables[state.row, : state.num_blocks] = 0
            self._free.append(state.row)

    def extend(self, state: SequenceState, block_ids: list[int], num_blocks: int) -> None:
        """Copy what the table has gained: within a residence it only grows."""
        have = state.num_blocks
        self.block_tables[state.row, have:num_blocks] = block_ids[have:num_blocks]
        state.num_blocks = num_blocks
