"""Choosing tokens in Triton: the rules, order and noise of `reference_sampling`, a row in a program.

A row is walked several times and never sorted. Cutoffs are found by bisecting the bits of the values, which
rise as values fall once the sign is dropped (none is above 0): three bits a walk, by the weight that lies in
each of eight ranges. What is drawn is decided in float64 as in the reference; float32 bounds say which parts
of the vocabulary can be drawn at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ellm.kernels import noise

NEG_INF = tl.constexpr(float("-inf"))
KEY_OF_INF = tl.constexpr(0x7F800000)
BITS = tl.constexpr(3)
RANGES = tl.constexpr(1 << 3)
FIRST_SHIFT = tl.constexpr(30)  # of 31 bits
SLACK = tl.constexpr(0.01)  # more than float32 can err in a bound
GOLDEN = tl.constexpr(noise.GOLDEN)
MIX_1 = tl.constexpr(noise.MIX_1)
MIX_2 = tl.constexpr(noise.MIX_2)
STEP = tl.constexpr(2.0**-52)  # between words of 52 bits
TOP = tl.constexpr(2.0**52 - 0.5)


@triton.jit
def _mix(x):
    """splitmix64's finaliser on unsigned words."""
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _row_key(seed, choice, output):
    golden = seed.to(tl.uint64) * 0 + GOLDEN
    key = _mix(seed.to(tl.uint64) + golden)
    key = _mix((key ^ choice.to(tl.uint64)) + golden)
    return _mix((key ^ output.to(tl.uint64)) + golden)


@triton.jit
def _load(row, words, mask, start, vocab, BLOCK: tl.constexpr, HAS_MASKS: tl.constexpr):
    """(ids, their logits in float32); -inf where there is none or a mask bans it."""
    column = start + tl.arange(0, BLOCK)
    inside = column < vocab
    value = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_MASKS:
        word = tl.load(words + column // 32, mask=inside & (column * 0 + mask >= 0), other=-1)
        inside = inside & (((word >> (column % 32)) & 1) != 0)
    return column, tl.where(inside, value, NEG_INF)


@triton.jit
def _scale(value, peak, temperature):
    """(value - peak) / temperature, 0 for the peak itself at any temperature."""
    z = tl.div_rn(value - peak, temperature)
    z = tl.where(value == peak, 0.0, z)
    return tl.where(value == NEG_INF, NEG_INF, z)


@triton.jit
def _kept(z, column, last_key, last_id):
    """(bits of z, which of them stay): those before the last one in order of (value falling, id rising)."""
    key = tl.abs(z).to(tl.int32, bitcast=True)
    return key, (key < last_key) | ((key == last_key) & (column <= last_id))


@triton.jit
def _weight(z, counted, BY_MASS: tl.constexpr):
    if BY_MASS:
        return tl.where(counted, tl.exp(tl.where(counted, z, 0.0).to(tl.float64)), 0.0)
    else:
        return tl.where(counted, 1.0, 0.0).to(tl.float64)


@triton.jit
def _find_key(
    row, words, mask, vocab, peak, temperature, last_key, last_id, share,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """(bits of the value at which the weight reaches the limit, weight before it, the limit).

    The limit is `share`, of all weight that is kept where BY_MASS. Where it is never reached, the last value.
    """
    prefix = last_key * 0
    before = share * 0.0
    limit = share
    which = tl.arange(0, RANGES)
    for step in range(0, FIRST_SHIFT // BITS + 1):
        shift = FIRST_SHIFT - BITS * step
        sums = tl.zeros([BLOCK, RANGES], dtype=tl.float64)
        for start in range(0, vocab, BLOCK):
            column, value = _load(row, words, mask, start, vocab, BLOCK, HAS_MASKS)
            z = _scale(value, peak, temperature)
            key, kept = _kept(z, column, last_key, last_id)
            # Two shifts: all at once would be by more bits than there are.
            counted = kept & (((key >> shift) >> BITS) == prefix)
            if tl.max(counted.to(tl.int32), 0) > 0:
                weight = _weight(z, counted, BY_MASS)
                range_of = (key >> shift) & (RANGES - 1)
                sums += tl.where(range_of[:, None] == which[None, :], weight[:, None], 0.0)
        found = tl.sum(sums, 0)
        if BY_MASS:
            limit = tl.where(step == 0, share * tl.sum(found, 0), limit)
        reached = before + tl.cumsum(found, 0)
        first = tl.min(tl.where((reached >= limit) & (found > 0.0), which, RANGES), 0)
        last = tl.maximum(tl.max(tl.where(found > 0.0, which, -1), 0), 0)
        chosen = tl.where(first < RANGES, first, last)
        before += tl.sum(tl.where(which < chosen, found, 0.0), 0)
        prefix = (prefix << BITS) | chosen
    return prefix, before, limit


@triton.jit
def _cut(
    row, words, mask, vocab, peak, temperature, last_key, last_id, share,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """The last token that stays, as (bits of its value, its id)."""
    at, before, limit = _find_key(
        row, words, mask, vocab, peak, temperature, last_key, last_id, share, BY_MASS, BLOCK, HAS_MASKS
    )
    # Of equal values those stay before which the limit is not reached; the first of all always does.
    weight = before * 0.0 + 1.0
    if BY_MASS:
        weight = tl.exp(-at.to(tl.float32, bitcast=True).to(tl.float64))
    room = tl.minimum(tl.ceil((limit - before) / weight), 2147483647.0)
    room = tl.maximum(room, tl.where(before > 0.0, 0.0, 1.0)).to(tl.int32)
    seen = last_id * 0
    found = seen - 1
    for start in range(0, vocab, BLOCK):
        column, value = _load(row, words, mask, start, vocab, BLOCK, HAS_MASKS)
        key, kept = _kept(_scale(value, peak, temperature), column, last_key, last_id)
        tied = (kept & (key == at)).to(tl.int32)
        number = seen + tl.cumsum(tied, 0)
        found = tl.maximum(found, tl.max(tl.where((tied > 0) & (number <= room), column, -1), 0))
        seen += tl.sum(tied, 0)
    return at, found


@triton.jit
def _draw(
    row, words, mask, vocab, peak, temperature, last_key, last_id, min_p, key,
    BLOCK: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_MIN_P: tl.constexpr,
):  # fmt: skip
    """The kept token of the largest z + noise, the lowest id of equals."""
    best = tl.full((), NEG_INF, tl.float64)
    token = last_id * 0
    for start in range(0, vocab, BLOCK):
        column, value = _load(row, words, mask, start, vocab, BLOCK, HAS_MASKS)
        z = _scale(value, peak, temperature)
        _, kept = _kept(z, column, last_key, last_id)
        if HAS_MIN_P:
            kept = kept & (tl.exp(z) >= min_p)
        bits = _mix(key + (column.to(tl.uint64) + 1) * GOLDEN) >> 12
        # 1 - u is at most -log(u): no token's score is above z - log(1 - u).
        gap = ((0.0 - bits.to(tl.float64) + TOP) * STEP).to(tl.float32)
        bound = tl.where(kept, z - tl.log(gap) + SLACK, NEG_INF)
        if tl.max(bound, 0).to(tl.float64) > best:
            uniform = (bits.to(tl.float64) + 0.5) * STEP
            score = tl.where(kept, tl.where(kept, z, 0.0).to(tl.float64) - tl.log(-tl.log(uniform)), NEG_INF)
            top = tl.max(score, 0)
            place = tl.min(tl.where(score == top, column, vocab), 0)
            token = tl.where(top > best, place, token)
            best = tl.maximum(top, best)
    return token


@triton.jit
def sample_kernel(
    logits,
    out,  # [S] int64
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    choices,
    outputs,
    mask_of,  # [S] int32: a row's mask, or -1
    masks,
    vocab,
    logits_row,
    masks_row,
    BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    HAS_MASKS: tl.constexpr,
):
    """Grid: (rows,)."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * logits_row
    words, mask = masks, index * 0 - 1
    if HAS_MASKS:
        mask = tl.load(mask_of + index)
        words = masks + tl.maximum(mask, 0).to(tl.int64) * masks_row
    peak = tl.full((), NEG_INF, tl.float32)
    token = index * 0
    for start in range(0, vocab, BLOCK):
        column, value = _load(row, words, mask, start, vocab, BLOCK, HAS_MASKS)
        top = tl.max(value, 0)
        place = tl.min(tl.where(value == top, column, vocab), 0)
        token = tl.where(top > peak, place, token)
        peak = tl.maximum(top, peak)
    if DRAWS:
        temperature = tl.load(temperatures + index)
        if temperature > 0.0:
            last_key, last_id = index * 0 + KEY_OF_INF, index * 0 - 1
            if HAS_TOP_K:
                top_k = tl.load(top_ks + index)
                if (top_k > 0) & (top_k < vocab):
                    last_key, last_id = _cut(
                        row, words, mask, vocab, peak, temperature, last_key, last_id,
                        top_k.to(tl.float64), False, BLOCK, HAS_MASKS,
                    )  # fmt: skip
            if HAS_TOP_P:
                top_p = tl.load(top_ps + index)
                if top_p < 1.0:
                    last_key, last_id = _cut(
                        row, words, mask, vocab, peak, temperature, last_key, last_id,
                        top_p.to(tl.float64), True, BLOCK, HAS_MASKS,
                    )  # fmt: skip
            min_p = temperature * 0.0
            if HAS_MIN_P:
                min_p = tl.load(min_ps + index)
            key = _row_key(tl.load(seeds + index), tl.load(choices + index), tl.load(outputs + index))
            token = _draw(
                row, words, mask, vocab, peak, temperature, last_key, last_id, min_p, key,
                BLOCK, HAS_MASKS, HAS_MIN_P,
            )  # fmt: skip
    tl.store(out + index, token.to(tl.int64))


@triton.jit
def bias_kernel(logits, rows, ids, additions, count, vocab, BLOCK: tl.constexpr):
    """Grid: (parts of the list,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = at < count
    row, token = tl.load(rows + at, mask=mine, other=0), tl.load(ids + at, mask=mine, other=0)
    tl.atomic_add(logits + row * vocab + token, tl.load(additions + at, mask=mine, other=0.0), mask=mine)


@triton.jit
def penalise_kernel(
    logits,
    cu,
    ids,
    counts,
    repetitions,
    presences,
    frequencies,
    vocab,
    BLOCK: tl.constexpr,
    HAS_REPETITION: tl.constexpr,
    HAS_PRESENCE: tl.constexpr,
    HAS_FREQUENCY: tl.constexpr,
):
    """Grid: (rows,). A row has an id once."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(cu + row + 1)
    for start in range(tl.load(cu + row), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = at < end
        place = logits + row * vocab + tl.load(ids + at, mask=mine, other=0)
        value = tl.load(place, mask=mine, other=0.0)
        if HAS_REPETITION:
            factor = tl.load(repetitions + row)
            value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
        count = tl.load(counts + at, mask=mine, other=0)
        if HAS_FREQUENCY:
            value -= tl.load(frequencies + row) * count.to(tl.float32)
        if HAS_PRESENCE:
            value -= tl.where(count > 0, tl.load(presences + row), 0.0)
        tl.store(place, value, mask=mine)
