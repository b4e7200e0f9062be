"""Builds a step's sampling batch from the sequences' own parameters, and reads log-probabilities back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ellm.kernels.ops import Ops, SamplingBatch
from ellm.worker.api.output import TokenLogprobs
from ellm.worker.model.layers import GREEDY, CausalModel
from ellm.worker.model.sequences import SequenceState, TokenCounts
from ellm.worker.model.staging import ToHost, to_device

_SCORED_BYTES = 64 * 1024 * 1024  # of float32 logits held at once for prompt log-probabilities


@dataclass(frozen=True, slots=True)
class AskedScores:
    """Log-probabilities on their way to the host, of the sequences of a step that ask for them."""

    asked: list[int]  # which of the step's sequences
    num_top: list[int]  # likeliest tokens for each
    found: ToHost  # logprob [n], rank [n], top ids [n, most], top logprobs [n, most]

    def read(self) -> dict[int, TokenLogprobs]:
        """Index of the sequence -> its token's."""
        return dict(zip(self.asked, _scores(self.found.wait(), self.num_top), strict=True))


class Sampler:
    """Samples one token per row, with every row's own parameters."""

    def __init__(self, ops: Ops, vocab_size: int, device: torch.device) -> None:
        self._ops = ops
        self._device = device
        self._vocab_size = vocab_size
        self._slice_rows = max(1, _SCORED_BYTES // (4 * vocab_size))

    def sample(self, logits: Tensor, states: list[SequenceState], output_index: list[int]) -> Tensor:
        """logits [S, V] of S sequences, each about to emit the output token of that index -> ids [S]."""
        if all(state.plain for state in states):
            return self._ops.sample(logits, GREEDY)
        return self._ops.sample(logits, self._batch(states, output_index))

    def logprobs(self, logits: Tensor, tokens: Tensor, states: list[SequenceState]) -> AskedScores | None:
        """Log-probabilities of tokens [S], one for each of `states`, for those that ask."""
        asked = [i for i, s in enumerate(states) if s.sampling.logprobs is not None]
        if not asked:
            return None
        if len(asked) < len(states):
            rows = to_device(np.array(asked, dtype=np.int64), self._device)
            logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
        num_top = [states[i].sampling.logprobs or 0 for i in asked]
        found = self._ops.logprobs(logits, tokens, max(num_top))
        return AskedScores(asked, num_top, ToHost(found, self._device))

    def score_prompt(
        self, model: CausalModel, hidden: Tensor, next_ids: tuple[int, ...], num_top: int
    ) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of next_ids [n] under hidden [n, E], in slices so that [n, V] is never whole."""
        scores: list[TokenLogprobs] = []
        for first in range(0, len(next_ids), self._slice_rows):
            ids = next_ids[first : first + self._slice_rows]
            logits = model.logits(hidden[first : first + len(ids)])
            tokens = to_device(np.array(ids, dtype=np.int64), self._device)
            found = ToHost(self._ops.logprobs(logits, tokens, num_top), self._device)
            scores += _scores(found.wait(), [num_top] * len(ids))
        return tuple(scores)

    def _batch(self, states: list[SequenceState], output_index: list[int]) -> SamplingBatch:
        params = [s.sampling for s in states]
        drawn = not all(p.greedy for p in params)
        penalises = any(s.counts is not None for s in states)
        return SamplingBatch(
            temperature=self._floats([p.temperature for p in params], 0.0) if drawn else None,
            top_k=self._ints([p.top_k for p in params], 0) if drawn else None,
            top_p=self._floats([p.top_p for p in params], 1.0) if drawn else None,
            min_p=self._floats([p.min_p for p in params], 0.0) if drawn else None,
            seeds=self._seeds([p.seed for p in params]) if drawn else None,
            choice_index=self._ints([s.choice_index for s in states]) if drawn else None,
            output_index=self._ints(output_index) if drawn else None,
            repetition=self._floats([p.repetition_penalty for p in params], 1.0) if penalises else None,
            presence=self._floats([p.presence_penalty for p in params], 0.0) if penalises else None,
            frequency=self._floats([p.frequency_penalty for p in params], 0.0) if penalises else None,
            **(self._penalties([s.counts for s in states]) if penalises else {}),
            **self._biases(states, output_index),
            **self._masks(states),
        )

    def _penalties(self, counts: list[TokenCounts | None]) -> dict[str, Tensor]:
        cu = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum([0 if c is None else len(c.ids) for c in counts], out=cu[1:])
        present = [c for c in counts if c is not None]
        return {
            "penalty_cu": to_device(cu, self._device),
            "penalty_ids": to_device(np.concatenate([c.ids for c in present]), self._device),
            "penalty_output_counts": to_device(
                np.concatenate([c.output_counts for c in present]), self._device
            ),
        }

    def _biases(self, states: list[SequenceState], output_index: list[int]) -> dict[str, Tensor]:
        found = [
            (i, *state.bias.at(index))
            for i, (state, index) in enumerate(zip(states, output_index, strict=True))
            if state.bias is not None
        ]
        found = [part for part in found if len(part[1])]
        if not found:
            return {}
        rows = np.repeat([i for i, _, _ in found], [len(ids) for _, ids, _ in found])
        return {
            "bias_row": to_device(rows.astype(np.int64), self._device),
            "bias_ids": to_device(np.concatenate([ids for _, ids, _ in found]), self._device),
            "bias": to_device(np.concatenate([values for _, _, values in found]), self._device),
        }

    def _masks(self, states: list[SequenceState]) -> dict[str, Tensor]:
        """Of rows with a grammar; of none where all of them have ended."""
        constrained = [(i, state.grammar) for i, state in enumerate(states) if state.grammar is not None]
        if not constrained:
            return {}
        masks = np.zeros((len(constrained), (self._vocab_size + 31) // 32), dtype=np.int32)
        filled = [j for j, (_, grammar) in enumerate(constrained) if grammar.fill(masks[j])]
        if not filled:
            return {}
        rows = np.array([constrained[j][0] for j in filled], dtype=np.int64)
        return {
            "mask_row": to_device(rows, self._device),
            "masks": to_device(masks if len(filled) == len(masks) else masks[filled], self._device),
        }

    def _floats(self, values: list[float], off: float) -> Tensor | None:
        """[S] float32, or None where every row has the feature off."""
        if all(v == off for v in values):
            return None
        return to_device(np.array(values, dtype=np.float32), self._device)

    def _ints(self, values: list[int], off: int | None = None) -> Tensor | None:
        if off is not None and all(v == off for v in values):
            return None
        return to_device(np.array(values, dtype=np.int64), self._device)

    def _seeds(self, values: list[int]) -> Tensor:
        """Unsigned 64 bit seeds as the int64 of the same bits."""
        return to_device(np.array(values, dtype=np.uint64).view(np.int64), self._device)


def _scores(found: Sequence[Tensor], num_top: list[int]) -> list[TokenLogprobs]:
    """Row by row, `num_top` of each."""
    columns = (column.tolist() for column in found)
    return [
        TokenLogprobs(p, r, tuple(zip(ids[:n], values[:n], strict=True)))
        for p, r, ids, values, n in zip(*columns, num_top, strict=True)
    ]
