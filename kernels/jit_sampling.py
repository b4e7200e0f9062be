"""Choosing tokens: a row of logits is one unit of work. Rules, order and ties as in `reference_sampling`.

Cutoffs need no sort: top-k and top-p both keep tokens in order of (value falling, id rising) while what was
kept before, in tokens or in probability, is below a limit. That is a radix selection on the bits of the
value: three passes over the row find the last value that stays and how many of its equals do.

Noise needs few logarithms: a token can only win if 1 - u < exp(z - best score so far), and that is checked on
16 tokens at a time before anything exact is computed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ellm.kernels.jit_ir import LANES, inline, merge
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_math import exp
from ellm.kernels.jit_memory import (
    fetch_add,
    item_size,
    load_double,
    load_f32,
    load_float,
    load_i32,
    load_i64,
    load_part,
    store_double,
    store_f32,
    store_float,
    store_i64,
    word,
)
from ellm.kernels.jit_noise import noise_words, row_key, uniform
from ellm.kernels.jit_vector import keep_lanes, lane_numbers, larger, peak, spread, where_less

NEG_INF = np.float32(-np.inf)
INF = np.float32(np.inf)
ZERO, ONE = np.float32(0.0), np.float32(1.0)
BUCKETS = 2048
KEY_BITS, KEY_OF_INF = 0x7FFFFFFF, 0x7F800000

# The words of the block, after the header. 0 stands for a tensor that is absent.
(
    ROWS,
    VOCAB,
    LOGITS,
    LOGITS_ROW,  # bytes
    OUT,  # [S] int64
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    SEEDS,
    CHOICE,
    OUTPUT,
    SCRATCH,
    SCRATCH_BYTES,  # of a thread
) = range(14)


def scratch_bytes(vocab: int) -> int:
    """Of one thread: two rows of float32, padded; the buckets, float64; 16 words of noise."""
    return 2 * 4 * (vocab + 2 * LANES) + 8 * BUCKETS + 8 * LANES


@inline
def _padded(vocab):
    return (vocab + LANES - 1) // LANES * LANES


@inline
def argmax(kind, source, count):
    """(index, value) of the largest of `count` elements, the first of equals; (0, -inf) if none is larger."""
    best, where = spread(NEG_INF), spread(INF)
    size = item_size(kind)
    for i in range(0, count, LANES):
        v = load_part(kind, source + i * size, count - i)
        if count - i < LANES:
            v = keep_lanes(v, 0, count - i, NEG_INF)
        where = where_less(best, v, lane_numbers() + spread(np.float32(i)), where)
        best = larger(v, best)
    top = peak(best)
    first = -peak(spread(np.float32(0.0)) - where_less(best, spread(top), spread(INF), where))
    return (int(first) if first < INF else 0), top


@inline
def _scale(kind, source, vocab, top, temperature, z, mass):
    """z = (logit - top) / temperature and exp(z) for a whole row; -inf and 0 in the padding."""
    for i in range(0, vocab, LANES):
        logit = load_part(kind, source + i * item_size(kind), vocab - i)
        scaled = (logit - spread(top)) / spread(temperature)
        if vocab - i < LANES:
            scaled = keep_lanes(scaled, 0, vocab - i, NEG_INF)
        scaled = where_less(spread(NEG_INF), scaled, scaled, spread(NEG_INF))  # also NaN
        store_f32(z + 4 * i, scaled)
        store_f32(mass + 4 * i, exp(scaled))


@inline
def _weight(by_mass, mass, i):
    return float(load_float(mass + 4 * i)) if by_mass else 1.0


@inline
def _drop(z, mass, i):
    store_float(z + 4 * i, NEG_INF)
    store_float(mass + 4 * i, np.float32(0.0))


@inline
def _fill_buckets(z, mass, vocab, by_mass, buckets, shift, bits, prefix):
    """Sum the weights of the tokens whose key begins with `prefix`, by the next bits of the key."""
    for b in range(1 << bits):
        store_double(buckets + 8 * b, 0.0)
    for i in range(vocab):
        key = load_i32(z + 4 * i) & KEY_BITS
        if key < KEY_OF_INF and key >> (shift + bits) == prefix:
            at = buckets + 8 * ((key >> shift) & ((1 << bits) - 1))
            store_double(at, load_double(at) + _weight(by_mass, mass, i))


@inline
def _find_bucket(buckets, count, before, limit):
    """(bucket in which the sum reaches `limit`, or the last filled one; sum before it; sum with it)."""
    chosen, so_far = -1, before
    for b in range(count):
        weight = load_double(buckets + 8 * b)
        if weight > 0.0:
            chosen, before = b, so_far
            so_far += weight
            if so_far >= limit:
                break
    return chosen, before, so_far


@inline
def _cut(z, mass, vocab, by_mass, limit, buckets):
    """Drop what comes after `limit` (tokens, or a share of the mass) in order of (value falling, id rising).

    Values are 0 or less, so without their sign their bits rise as they fall: the keys.
    """
    prefix, before = 0, 0.0
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        _fill_buckets(z, mass, vocab, by_mass, buckets, shift, bits, prefix)
        if by_mass and shift == 20:
            limit *= _find_bucket(buckets, 1 << bits, 0.0, math.inf)[2]
        chosen, before, reached = _find_bucket(buckets, 1 << bits, before, limit)
        if chosen < 0 or (shift == 20 and reached < limit):
            return
        prefix = (prefix << bits) | chosen
    for i in range(vocab):
        key = load_i32(z + 4 * i) & KEY_BITS
        if key == prefix:
            weight = _weight(by_mass, mass, i)
            if before >= limit and before > 0.0:  # the first token always stays
                _drop(z, mass, i)
            before += weight
        elif key > prefix:
            _drop(z, mass, i)


@inline
def _drop_below(z, mass, vocab, least):
    """Drop tokens less likely than `least` times the most likely one."""
    for i in range(0, vocab, LANES):
        v, p = load_f32(z + 4 * i), load_f32(mass + 4 * i)
        store_f32(z + 4 * i, where_less(p, spread(least), spread(NEG_INF), v))


@inline
def _best_of(z, first, words, best, token):
    """Score the tokens [first, first + 16) exactly; returns the best of them and what was best before."""
    for lane in range(LANES):
        value = load_float(z + 4 * (first + lane))
        if value > NEG_INF:
            score = value - math.log(-math.log(uniform(load_i64(words + 8 * lane))))
            if score > best:
                best, token = score, first + lane
    return best, token


@inline
def _draw(z, vocab, key, words):
    """The token of the largest z + noise, the first of equals."""
    best, token = -math.inf, 0
    for i in range(0, vocab, LANES):
        gap = noise_words(key, i, words)  # 1 - u, which is at most -log(u)
        # float32 is exact to 1e-6 here, unless the values are huge.
        bound = exp(load_f32(z + 4 * i) - spread(np.float32(best)))
        hopeful = where_less(gap * spread(np.float32(0.9999)), bound, spread(ONE), spread(ZERO))
        if best < -1000.0 or peak(hopeful) > ZERO:
            best, token = _best_of(z, i, words, best, token)
    return token


@inline
def _optional(block, index, row, otherwise):
    """Element `row` of a float32 tensor that may be absent."""
    address = word(block, index)
    return load_float(address + 4 * row) if address != 0 else np.float32(otherwise)


@merge
def _sample_row(block, kind, row, logits, top, scratch):
    vocab = word(block, VOCAB)
    z = scratch
    mass = z + 4 * _padded(vocab)
    buckets = mass + 4 * _padded(vocab)
    words = buckets + 8 * BUCKETS
    _scale(kind, logits, vocab, top, load_float(word(block, TEMPERATURE) + 4 * row), z, mass)
    if word(block, TOP_K) != 0:
        top_k = load_i64(word(block, TOP_K) + 8 * row)
        if 0 < top_k < vocab:
            _cut(z, mass, vocab, False, float(top_k), buckets)
    top_p = _optional(block, TOP_P, row, 1.0)
    if top_p < ONE:
        _cut(z, mass, vocab, True, float(top_p), buckets)
    min_p = _optional(block, MIN_P, row, 0.0)
    if min_p > ZERO:
        _drop_below(z, mass, vocab, min_p)
    seed = load_i64(word(block, SEEDS) + 8 * row)
    choice = load_i64(word(block, CHOICE) + 8 * row)
    key = row_key(seed, choice, load_i64(word(block, OUTPUT) + 8 * row))
    return _draw(z, vocab, key, words)


def _sample(variant: int) -> Any:
    def sample(block):
        kind = variant & 3
        scratch = word(block, SCRATCH) + fetch_add(block + 8, 1) * word(block, SCRATCH_BYTES)
        row = fetch_add(block, 1)
        while row < word(block, ROWS):
            logits = word(block, LOGITS) + row * word(block, LOGITS_ROW)
            token, top = argmax(kind, logits, word(block, VOCAB))
            if word(block, TEMPERATURE) != 0 and load_float(word(block, TEMPERATURE) + 4 * row) > ZERO:
                token = _sample_row(block, kind, row, logits, top, scratch)
            store_i64(word(block, OUT) + 8 * row, token)
            row = fetch_add(block, 1)

    return sample


sample = Kernel(_sample)
