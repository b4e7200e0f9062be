"""Log-probabilities, ranks and the most likely tokens of rows of logits; a row is one unit of work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ellm.kernels.jit_ir import LANES, inline
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_math import exp
from ellm.kernels.jit_memory import (
    fetch_add,
    item_size,
    load_float,
    load_i64,
    load_part,
    store_f32,
    store_float,
    store_i64,
    word,
)
from ellm.kernels.jit_sampling import NEG_INF, ONE, ZERO, argmax
from ellm.kernels.jit_vector import keep_lanes, lane_numbers, peak, spread, total, where_less

# The words of the block, after the header.
(
    ROWS,
    VOCAB,
    LOGITS,
    LOGITS_ROW,  # bytes
    TOKENS,  # [S] int64
    LOGPROBS,  # [S] float32
    RANKS,  # [S] int64
    NUM_TOP,
    TOP_IDS,  # [S, num_top] int64
    TOP_LOGPROBS,  # [S, num_top] float32
    SCRATCH,
    SCRATCH_BYTES,
) = range(12)


@inline
def _values(kind, source, vocab, i):
    """Logits [i, i + 16) of a row, -inf past its end."""
    v = load_part(kind, source + i * item_size(kind), vocab - i)
    return keep_lanes(v, 0, vocab - i, NEG_INF) if vocab - i < LANES else v


@inline
def _log_sum(kind, source, vocab):
    """log(sum(exp(logits)))."""
    top = argmax(kind, source, vocab)[1]
    sums = spread(ZERO)
    for i in range(0, vocab, LANES):
        sums = sums + exp(_values(kind, source, vocab, i) - spread(top))
    return float(top) + math.log(total(sums))


@inline
def _rank(kind, source, vocab, token, value):
    """1 + how many tokens are larger, or equal and before it."""
    above = spread(ZERO)
    ids = lane_numbers()
    for i in range(0, vocab, LANES):
        v = _values(kind, source, vocab, i)
        tied = where_less(ids + spread(np.float32(i)), spread(np.float32(token)), spread(ONE), spread(ZERO))
        level = where_less(v, spread(value), spread(ZERO), tied)
        above = above + where_less(spread(value), v, spread(ONE), level)
    return 1 + int(total(above))


@inline
def _insert(ids, values, count, num_top, token, value):
    """Put a token into the list of the largest, behind its equals; returns the list's length."""
    at = count if count < num_top else num_top - 1
    while at > 0 and load_float(values + 4 * (at - 1)) < value:
        store_i64(ids + 8 * at, load_i64(ids + 8 * (at - 1)))
        store_float(values + 4 * at, load_float(values + 4 * (at - 1)))
        at -= 1
    store_i64(ids + 8 * at, token)
    store_float(values + 4 * at, value)
    return min(count + 1, num_top)


@inline
def _find_top(kind, source, vocab, ids, values, num_top, lanes):
    """Fill the list of the `num_top` largest logits, in order of (value falling, id rising)."""
    count = 0
    for i in range(0, vocab, LANES):
        v = _values(kind, source, vocab, i)
        if count < num_top or peak(v) > load_float(values + 4 * (num_top - 1)):
            store_f32(lanes, v)
            for lane in range(min(LANES, vocab - i)):
                value = load_float(lanes + 4 * lane)
                if count < num_top or value > load_float(values + 4 * (num_top - 1)):
                    count = _insert(ids, values, count, num_top, i + lane, value)


def _logprobs(variant: int) -> Any:
    def logprobs(block):
        kind = variant & 3
        scratch = word(block, SCRATCH) + fetch_add(block + 8, 1) * word(block, SCRATCH_BYTES)
        vocab, num_top = word(block, VOCAB), word(block, NUM_TOP)
        row = fetch_add(block, 1)
        while row < word(block, ROWS):
            source = word(block, LOGITS) + row * word(block, LOGITS_ROW)
            token = load_i64(word(block, TOKENS) + 8 * row)
            chosen = load_part(kind, source + token * item_size(kind), 1)
            value = total(chosen)
            log_sum = _log_sum(kind, source, vocab)
            store_float(word(block, LOGPROBS) + 4 * row, np.float32(value - log_sum))
            store_i64(word(block, RANKS) + 8 * row, _rank(kind, source, vocab, token, value))
            if num_top > 0:
                ids = word(block, TOP_IDS) + 8 * row * num_top
                values = word(block, TOP_LOGPROBS) + 4 * row * num_top
                _find_top(kind, source, vocab, ids, values, num_top, scratch)
                for i in range(num_top):
                    store_float(values + 4 * i, np.float32(load_float(values + 4 * i) - log_sum))
            row = fetch_add(block, 1)

    return logprobs


logprobs = Kernel(_logprobs)
