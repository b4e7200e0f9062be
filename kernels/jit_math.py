"""Powers on vectors, from arithmetic alone: the same bits on every CPU, within 1 unit in the last place."""

from __future__ import annotations

import math

from ellm.kernels.jit_ir import inline
from ellm.kernels.jit_vector import fma, larger, nearest, smaller, spread, times_power_of_two, where_less

LOG2_E = 1.4426950408889634
_LOG2_E_HIGH = 1.4426950216293335  # LOG2_E as float32, and what is missing
_LOG2_E_LOW = 1.925963033500011e-08
_INF = math.inf


@inline
def _power(whole, part):
    """2^(whole + part) for |part| <= 1/2; 0 below 2^-126, infinite from 2^128 on.

    (2^f - 1) / f by its Chebyshev approximation of degree 5 on [-1/2, 1/2]; exactly 1 at 0.
    """
    y = spread(0.00015453163359779865)
    y = fma(y, part, spread(0.0013390863314270973))
    y = fma(y, part, spread(0.009618083015084267))
    y = fma(y, part, spread(0.055503569543361664))
    y = fma(y, part, spread(0.24022650718688965))
    y = fma(y, part, spread(0.6931471824645996))
    y = fma(y, part, spread(1.0))
    y = times_power_of_two(y, whole)
    y = where_less(whole, spread(-126.0), spread(0.0), y)
    return where_less(spread(127.0), whole, spread(_INF), y)


@inline
def exp2(x):
    """2^x."""
    x = larger(smaller(x, spread(200.0)), spread(-200.0))
    whole = nearest(x)
    return _power(whole, x - whole)


@inline
def exp(x):
    """e^x: x * log2(e) with log2(e) in two parts, so that large x keep their accuracy."""
    x = larger(smaller(x, spread(120.0)), spread(-120.0))
    whole = nearest(x * spread(_LOG2_E_HIGH))
    part = fma(x, spread(_LOG2_E_HIGH), spread(0.0) - whole)
    return _power(whole, fma(x, spread(_LOG2_E_LOW), part))
