"""Sampling and log-probabilities by Triton kernels: rules and tokens are those of `reference_sampling`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ellm.kernels.ops import SamplingBatch
from ellm.kernels.reference_sampling import top_ids
from ellm.kernels.triton_floats import OPTIONS
from ellm.kernels.triton_sampling import NEG_INF, bias_kernel, penalise_kernel, sample_kernel

BLOCK = 1024  # logits of a step, or the vocabulary where that is smaller
NUM_WARPS = 8
LIST_BLOCK = 256  # entries of a list of biases or penalties


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """logits [S, V] -> token ids [S] int64."""
    rows, vocab = logits.shape
    if rows == 0 or (batch.temperature is None and _is_plain(batch)):
        return torch.argmax(logits, dim=-1)  # the first of equals
    if batch.bias is not None or batch.penalty_ids is not None:
        logits = _adjust(logits, batch)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    drawn = batch.temperature is not None
    settings = (batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    counters = (batch.seeds, batch.choice_index, batch.output_index)
    assert not drawn or None not in counters
    assert logits.stride(1) == 1
    masks, mask_of = batch.masks, out
    if masks is not None:
        assert masks.stride(1) == 1
        mask_of = _mask_of(batch, rows)
    sample_kernel[(rows,)](
        logits,
        out,
        *(out if x is None else x for x in (*settings, *counters)),
        mask_of,
        out if masks is None else masks,
        vocab,
        logits.stride(0),
        0 if masks is None else masks.stride(0),
        BLOCK=_block(vocab),
        DRAWS=drawn,
        HAS_TOP_K=drawn and batch.top_k is not None,
        HAS_TOP_P=drawn and batch.top_p is not None,
        HAS_MIN_P=drawn and batch.min_p is not None,
        HAS_MASKS=masks is not None,
        num_warps=NUM_WARPS,
        **OPTIONS,
    )
    return out


def _block(vocab: int) -> int:
    padded: int = triton.next_power_of_2(vocab)
    return min(BLOCK, max(128, padded))


def _is_plain(batch: SamplingBatch) -> bool:
    return batch.bias is None and batch.penalty_ids is None and batch.masks is None


def _mask_of(batch: SamplingBatch, rows: int) -> Tensor:
    """[S] int32: which mask each row obeys; -1: none."""
    assert batch.mask_row is not None
    of = torch.full((rows,), -1, dtype=torch.int32, device=batch.mask_row.device)
    of[batch.mask_row] = torch.arange(len(batch.mask_row), dtype=torch.int32, device=of.device)
    return of


def _adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Bias, then penalties, on a float32 copy [S, V]."""
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device).copy_(logits)
    if batch.bias is not None and len(batch.bias):
        grid = (triton.cdiv(len(batch.bias), LIST_BLOCK),)
        lists = (batch.bias_row, batch.bias_ids, batch.bias)
        bias_kernel[grid](out, *lists, len(batch.bias), vocab, BLOCK=LIST_BLOCK, **OPTIONS)
    if batch.penalty_ids is not None:
        settings = (batch.repetition, batch.presence, batch.frequency)
        has = dict(
            zip(
                ("HAS_REPETITION", "HAS_PRESENCE", "HAS_FREQUENCY"),
                (x is not None for x in settings),
                strict=True,
            )
        )
        penalise_kernel[(rows,)](
            out,
            batch.penalty_cu,
            batch.penalty_ids,
            batch.penalty_output_counts,
            *(out if x is None else x for x in settings),
            vocab,
            BLOCK=LIST_BLOCK,
            **has,
            **OPTIONS,
        )
    return out


@triton.jit
def score_kernel(
    logits,
    tokens,  # [S] int64
    norms,  # [S] float32: log(sum(exp(logits)))
    scores,  # [S] float32
    ranks,  # [S] int64
    vocab,
    logits_row,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,)."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_row
    token = tl.load(tokens + index)
    chosen = tl.load(row + token).to(tl.float32)
    peaks = tl.full([BLOCK], NEG_INF, tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(row + column, mask=column < vocab, other=0.0).to(tl.float32)
        value = tl.where(column < vocab, value, NEG_INF)
        peaks = tl.maximum(peaks, value)
        before = (value > chosen) | ((value == chosen) & (column < token))
        above += (before & (column < vocab)).to(tl.int32)
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == NEG_INF, 0.0, peak)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(row + column, mask=column < vocab, other=0.0).to(tl.float32)
        sums += tl.where(column < vocab, tl.exp(value - peak), 0.0)
    norm = peak + tl.log(tl.sum(sums, 0))
    tl.store(norms + index, norm)
    tl.store(scores + index, chosen - norm)
    tl.store(ranks + index, tl.sum(above, 0).to(tl.int64) + 1)


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    """(logprob [S], rank [S], top ids [S, num_top], top logprobs [S, num_top])."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    norms, scores = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    ranks = torch.empty(rows, dtype=torch.int64, device=logits.device)
    sizes: dict[str, Any] = {"BLOCK": _block(vocab), "num_warps": NUM_WARPS, **OPTIONS}
    if rows:
        score_kernel[(rows,)](logits, token_ids, norms, scores, ranks, vocab, logits.stride(0), **sizes)
    wide = logits.float()
    ids = top_ids(wide, min(num_top, vocab))
    return scores, ranks, ids, wide.gather(1, ids) - norms.unsqueeze(1)
