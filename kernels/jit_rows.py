"""Kernels whose unit of work is a run of rows: norms, activation, rotary embedding, KV store.

A row is walked in vectors from its own first element, the last one masked, so its arithmetic does not
depend on where it lies in the batch. Every kernel's words start with: rows, rows per unit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ellm.kernels.jit_ir import LANES, inline
from ellm.kernels.jit_launch import Kernel
from ellm.kernels.jit_math import exp
from ellm.kernels.jit_memory import (
    F32,
    copy_bytes,
    fetch_add,
    item_size,
    load_i64,
    load_part,
    store_part,
    word,
)
from ellm.kernels.jit_vector import float_from_bits, fma, keep_lanes, spread, total


@inline
def next_rows(block):
    """The next unit's rows [first, last); empty when all are given out."""
    rows, step = word(block, 0), word(block, 1)
    first = fetch_add(block, 1) * step
    return first, min(first + step, rows)


@inline
def _inverse_root(squares, n, eps):
    one = np.float32(1.0)
    return one / np.float32(math.sqrt(squares / np.float32(n) + eps))


def _rms_norm(variant: int) -> Any:
    def rms_norm(block):
        """words: rows, step, n, eps bits, weight, x, x row bytes, out, residual or 0, residual row bytes,
        parts, part bytes: x has so many to a row, which count as rows"""
        kind = variant & 3
        size = item_size(kind)
        n, weight, parts = word(block, 2), word(block, 4), word(block, 10)
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                x = word(block, 5) + row // parts * word(block, 6) + row % parts * word(block, 11)
                out = word(block, 7) + row * n * size
                if word(block, 8) != 0:
                    added = word(block, 8) + row * word(block, 9)
                    for i in range(0, n, LANES):
                        v = load_part(kind, x + i * size, n - i) + load_part(kind, added + i * size, n - i)
                        store_part(kind, added + i * size, v, n - i)
                    x = added
                squares = spread(0.0)
                for i in range(0, n, LANES):
                    v = load_part(kind, x + i * size, n - i)
                    squares = fma(v, v, squares)
                scale = spread(_inverse_root(total(squares), n, float_from_bits(word(block, 3))))
                for i in range(0, n, LANES):
                    v = load_part(kind, x + i * size, n - i) * scale
                    v = v * load_part(kind, weight + i * size, n - i)
                    store_part(kind, out + i * size, v, n - i)
            first, last = next_rows(block)

    return rms_norm


def _widen(variant: int) -> Any:
    def widen(block):
        """words: rows, step, n, x, x row bytes, out: float32"""
        kind = variant & 3
        size, n = item_size(kind), word(block, 2)
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                x = word(block, 3) + row * word(block, 4)
                out = word(block, 5) + row * n * item_size(F32)
                for i in range(0, n, LANES):
                    store_part(F32, out + i * item_size(F32), load_part(kind, x + i * size, n - i), n - i)
            first, last = next_rows(block)

    return widen


def _layer_norm(variant: int) -> Any:
    def layer_norm(block):
        """words: rows, step, n, eps bits, weight, bias, x, x row bytes, out"""
        kind = variant & 3
        size = item_size(kind)
        n, weight, bias = word(block, 2), word(block, 4), word(block, 5)
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                x = word(block, 6) + row * word(block, 7)
                out = word(block, 8) + row * n * size
                added = spread(0.0)
                for i in range(0, n, LANES):
                    added = added + load_part(kind, x + i * size, n - i)
                mean = spread(total(added) / np.float32(n))
                squares = spread(0.0)
                for i in range(0, n, LANES):
                    v = load_part(kind, x + i * size, n - i) - mean
                    v = keep_lanes(v, 0, n - i, np.float32(0.0))
                    squares = fma(v, v, squares)
                scale = spread(_inverse_root(total(squares), n, float_from_bits(word(block, 3))))
                for i in range(0, n, LANES):
                    v = (load_part(kind, x + i * size, n - i) - mean) * scale
                    w = load_part(kind, weight + i * size, n - i)
                    v = fma(v, w, load_part(kind, bias + i * size, n - i))
                    store_part(kind, out + i * size, v, n - i)
            first, last = next_rows(block)

    return layer_norm


def _silu_mul(variant: int) -> Any:
    def silu_mul(block):
        """words: rows, step, n, gate_up, gate_up row bytes, out"""
        kind = variant & 3
        size = item_size(kind)
        n = word(block, 2)
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                gates = word(block, 3) + row * word(block, 4)
                ups = gates + n * size
                out = word(block, 5) + row * n * size
                for i in range(0, n, LANES):
                    gate = load_part(kind, gates + i * size, n - i)
                    up = load_part(kind, ups + i * size, n - i)
                    gate = gate / (spread(1.0) + exp(spread(0.0) - gate))
                    store_part(kind, out + i * size, gate * up, n - i)
            first, last = next_rows(block)

    return silu_mul


@inline
def _rotate(kind, head, half, cos, sin):
    size = item_size(kind)
    for i in range(0, half, LANES):
        c, s = load_part(F32, cos + i * 4, half - i), load_part(F32, sin + i * 4, half - i)
        low, high = head + i * size, head + (half + i) * size
        a, b = load_part(kind, low, half - i), load_part(kind, high, half - i)
        store_part(kind, low, fma(a, c, spread(0.0) - b * s), half - i)
        store_part(kind, high, fma(b, c, a * s), half - i)


def _rotary(variant: int) -> Any:
    def rotary(block):
        """words: rows, step, half, positions, cos_sin; of q, then of k: address, heads, row and head bytes"""
        kind = variant & 3
        half = word(block, 2)
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                cos = word(block, 4) + load_i64(word(block, 3) + 8 * row) * (8 * half)
                for head in range(word(block, 6)):
                    at = word(block, 5) + row * word(block, 7) + head * word(block, 8)
                    _rotate(kind, at, half, cos, cos + 4 * half)
                for head in range(word(block, 10)):
                    at = word(block, 9) + row * word(block, 11) + head * word(block, 12)
                    _rotate(kind, at, half, cos, cos + 4 * half)
            first, last = next_rows(block)

    return rotary


def _kv_store(variant: int) -> Any:
    def kv_store(block):
        """words: rows, step, slots, block size, heads, head bytes to copy, then for k and for v: source,
        its row and head bytes, cache, its block, head and token bytes"""
        heads, count = word(block, 4), word(block, 5) + 0 * variant
        first, last = next_rows(block)
        while first < last:
            for row in range(first, last):
                slot = load_i64(word(block, 2) + 8 * row)
                index, offset = slot // word(block, 3), slot % word(block, 3)
                for side in range(6, 20, 7):
                    source = word(block, side) + row * word(block, side + 1)
                    target = (
                        word(block, side + 3) + index * word(block, side + 4) + offset * word(block, side + 6)
                    )
                    for _ in range(heads):
                        copy_bytes(target, source, count)
                        source += word(block, side + 2)
                        target += word(block, side + 5)
            first, last = next_rows(block)

    return kv_store


rms_norm = Kernel(_rms_norm)
widen = Kernel(_widen)
layer_norm = Kernel(_layer_norm)
silu_mul = Kernel(_silu_mul)
rotary = Kernel(_rotary)
kv_store = Kernel(_kv_store)
