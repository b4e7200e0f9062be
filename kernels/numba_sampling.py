"""Sampling and log-probabilities on the CPU: checks tensors, then runs the kernels row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ellm.kernels import jit_logprobs, jit_sampling
from ellm.kernels.jit_memory import KINDS
from ellm.kernels.ops import SamplingBatch
from ellm.kernels.reference_sampling import adjust_logits
from ellm.kernels.scratch import scratch

GREEDY_UNIT = 1 << 16  # logits


def _logits(logits: Tensor) -> tuple[int, ...]:
    """(rows, vocabulary, address, row bytes)."""
    assert logits.dim() == 2
    assert logits.device.type == "cpu"
    assert logits.stride(1) == 1
    return (*logits.shape, logits.data_ptr(), logits.stride(0) * logits.element_size())


def _address(x: Tensor | None, rows: int, dtype: torch.dtype) -> int:
    """Of x [rows], or 0 where it is absent."""
    if x is None:
        return 0
    assert x.shape == (rows,)
    assert x.dtype == dtype
    assert x.is_contiguous()
    return x.data_ptr()


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """logits [S, V] -> token ids [S] int64."""
    logits = adjust_logits(logits, batch)
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    words = [*_logits(logits), out.data_ptr()]
    for settings in (batch.temperature, batch.top_k, batch.top_p, batch.min_p):
        words.append(_address(settings, rows, torch.int64 if settings is batch.top_k else torch.float32))
    for counter in (batch.seeds, batch.choice_index, batch.output_index):
        assert counter is not None or batch.temperature is None
        words.append(_address(counter, rows, torch.int64))
    num_bytes = jit_sampling.scratch_bytes(vocab)
    words += [scratch(num_bytes * torch.get_num_threads()), num_bytes]
    # An argmax is soon done; noise is worth other threads from the second row on.
    units = rows if batch.temperature is not None else rows * vocab // GREEDY_UNIT
    jit_sampling.sample(KINDS[logits.dtype], units, tuple(words))
    return out


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
    rows, vocab = logits.shape
    num_top = min(num_top, vocab)
    out = torch.empty(rows, dtype=torch.float32)
    ranks = torch.empty(rows, dtype=torch.int64)
    top_ids = torch.empty((rows, num_top), dtype=torch.int64)
    top = torch.empty((rows, num_top), dtype=torch.float32)
    words = [*_logits(logits), _address(token_ids, rows, torch.int64), out.data_ptr(), ranks.data_ptr()]
    words += [num_top, top_ids.data_ptr(), top.data_ptr(), scratch(64 * torch.get_num_threads()), 64]
    jit_logprobs.logprobs(KINDS[logits.dtype], rows, tuple(words))
    return out, ranks, top_ids, top
