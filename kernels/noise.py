"""Counter-based noise: the same (seed, choice, output index, token) gives the same bits on any device.

    mix(x)  = finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words
    key     = mix(mix(mix(seed + G) ^ choice + G) ^ output_index + G)       (one per row)
    word    = mix(key + (token + 1) * G)                                    (splitmix64's stream of that key)
    uniform = (word >> 12 + 1/2) * 2^-52                                    in (0, 1), exact in float64
    gumbel  = -log(-log(uniform))                                           in (-3.6, 36.8)

All arithmetic is modulo 2^64; signed words hold the bits of unsigned ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift_right(x: Tensor, count: int) -> Tensor:
    """Shift in zeros, as on unsigned words."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 words of any shape."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX_2)
    return x ^ _shift_right(x, 31)


def row_keys(seeds: Tensor, choice_index: Tensor, output_index: Tensor) -> Tensor:
    """Three int64 [S] -> int64 [S]."""
    golden = _signed(GOLDEN)
    key = mix(seeds + golden)
    key = mix((key ^ choice_index) + golden)
    return mix((key ^ output_index) + golden)


def uniform(keys: Tensor, token_ids: Tensor) -> Tensor:
    """keys [S, 1] and token ids [V] or [S, V], int64 -> float64 [S, V] in (0, 1)."""
    word = mix(keys + (token_ids + 1) * _signed(GOLDEN))
    return (_shift_right(word, 12).double() + 0.5) * 2.0**-52


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, shaped as `uniform`."""
    return -torch.log(-torch.log(uniform(keys, token_ids)))
