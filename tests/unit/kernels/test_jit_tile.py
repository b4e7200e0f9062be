"""Attention's inner products: how many sums are kept at once changes none of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytestmark = pytest.mark.needs_module("numba")

STEPS = 4  # of 64 bytes


def compiled(function: Any, count: int) -> Any:
    """A function of `count` words as one of their address."""
    from numba import cfunc
    from numba.core import types

    from ellm.kernels.jit_memory import load_i64

    if count == 6:

        def six(block):  # type: ignore[no-untyped-def]
            a, b, c = load_i64(block), load_i64(block + 8), load_i64(block + 16)
            function(a, b, c, load_i64(block + 24), load_i64(block + 32), load_i64(block + 40))

        return cfunc(types.void(types.intp))(six)

    def five(block):  # type: ignore[no-untyped-def]
        a, b, c = load_i64(block), load_i64(block + 8), load_i64(block + 16)
        function(a, b, c, load_i64(block + 24), load_i64(block + 32))

    return cfunc(types.void(types.intp))(five)


def run(function: Any, *words: int) -> None:
    block = np.array(words, dtype=np.int64)
    compiled(function, len(words)).ctypes(block.ctypes.data)


def pool(paired: bool) -> npt.NDArray[Any]:
    """16 tokens, a stride of 64 bytes more than they need."""
    values = np.random.default_rng(1).standard_normal((16, STEPS * 16 * (2 if paired else 1)), np.float32)
    if not paired:
        return np.pad(values, ((0, 0), (0, 16)))
    return np.pad((values.view(np.uint32) >> 16).astype(np.uint16), ((0, 0), (0, 32)))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_scores(paired: bool, count: int) -> None:
    from ellm.kernels import jit_tile

    keys = pool(paired)
    queries = np.random.default_rng(2).standard_normal((2, STEPS * 16 * (2 if paired else 1)), np.float32)
    found = []
    for most in (16, 8, 4, 2):
        out = np.zeros((2, jit_tile.TILE), np.float32)
        words = queries.ctypes.data, queries.strides[0], keys.ctypes.data, keys.strides[0], STEPS
        run(jit_tile._scores(paired, count, most), *words, out.ctypes.data)
        found.append(out)
    assert np.count_nonzero(found[0]) == 16 * count
    for other in found[1:]:
        assert np.array_equal(other, found[0])
    if not paired:
        expected = queries[:count].astype(np.float64) @ keys[:, : STEPS * 16].astype(np.float64).T
        assert np.allclose(found[0][:count, :16], expected, atol=1e-4)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_weighted_values(paired: bool, count: int) -> None:
    from ellm.kernels import jit_tile

    values, steps = pool(paired), 2 if paired else STEPS
    weights = np.random.default_rng(3).random((2, jit_tile.TILE), np.float32)
    found = []
    for most in (16, 8, 4, 2):
        out = np.ones((2, steps * 16 * (2 if paired else 1)), np.float32)
        words = weights.ctypes.data, values.ctypes.data, values.strides[0], out.ctypes.data, out.strides[0]
        run(jit_tile._add_weighted(paired, count, steps, most), *words)
        found.append(out)
    assert (found[0][:count] != 1.0).all()
    assert (found[0][count:] == 1.0).all()
    for other in found[1:]:
        assert np.array_equal(other, found[0])
    if not paired:
        expected = 1.0 + weights[:count, :16].astype(np.float64) @ values[:, : steps * 16].astype(np.float64)
        assert np.allclose(found[0][:count], expected, atol=1e-4)
