"""The noise: the same words in torch and in the JIT, documented to the bit, and uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ellm.kernels import noise

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64's finaliser as its authors write it."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected_bits(seed: int, choice: int, output: int, token: int) -> int:
    golden = 0x9E3779B97F4A7C15
    key = mix((seed + golden) & MASK)
    key = mix(((key ^ choice) + golden) & MASK)
    key = mix(((key ^ output) + golden) & MASK)
    return mix((key + (token + 1) * golden) & MASK) >> 12


ROWS = [
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (MASK, 7, 123456),
    (1 << 63, 3, 5),
    (12345678901234567890, 127, 1),
]


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_splitmix64_known_values() -> None:
    # The first outputs of splitmix64 seeded with 0, from its reference implementation.
    stream = noise.uniform(torch.zeros(1, 1, dtype=torch.int64), torch.arange(3))
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert (stream[0] * 2.0**52 - 0.5).tolist() == [word >> 12 for word in known]


def test_torch_words_are_the_documented_ones() -> None:
    seeds, choices, outputs = (torch.tensor([signed(r[i]) for r in ROWS]) for i in range(3))
    tokens = torch.tensor([0, 1, 15, 16, 151935])
    uniform = noise.uniform(noise.row_keys(seeds, choices, outputs).unsqueeze(1), tokens)
    bits = (uniform * 2.0**52 - 0.5).long().tolist()
    assert bits == [[expected_bits(*row, token) for token in tokens.tolist()] for row in ROWS]


@pytest.mark.needs_module("numba")
def test_jit_words_are_the_documented_ones() -> None:
    from numba import njit

    from ellm.kernels.jit_noise import noise_words, row_key, uniform

    @njit
    def words(seed, choice, output, token, target):  # type: ignore[no-untyped-def]
        noise_words(row_key(seed, choice, output), token, target)

    @njit
    def as_uniform(bits):  # type: ignore[no-untyped-def]
        return uniform(bits)

    for row in ROWS:
        for token in (0, 16, 151920):
            out = np.zeros(16, dtype=np.int64)
            words(*(signed(x) for x in row), token, out.ctypes.data)
            assert out.tolist() == [expected_bits(*row, token + lane) for lane in range(16)]
    seeds, choices, outputs = (torch.tensor([signed(ROWS[5][i])]) for i in range(3))
    keys = noise.row_keys(seeds, choices, outputs).unsqueeze(1)
    bits = expected_bits(*ROWS[5], 3)
    assert as_uniform(bits) == noise.uniform(keys, torch.tensor([3])).item()


def test_never_the_ends_of_the_interval() -> None:
    lowest, highest = 0.5 * 2.0**-52, ((1 << 52) - 0.5) * 2.0**-52
    assert lowest > 0.0
    assert highest < 1.0
    assert np.isfinite(-np.log(-np.log([lowest, highest]))).all()


@pytest.mark.parametrize("axis", range(4))
def test_uniform_and_uncorrelated_along_each_counter(axis: int) -> None:
    count = 1 << 14
    counters = [torch.full((count,), 3)] * 4
    counters[axis] = torch.arange(count)
    keys = noise.row_keys(*counters[:3]).unsqueeze(1)
    uniform = noise.uniform(keys, counters[3].unsqueeze(1)).flatten().numpy()
    histogram = np.histogram(uniform, bins=64, range=(0, 1))[0]
    chi_square = ((histogram - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 115  # 63 degrees of freedom: 1 in 10^4; the noise is fixed, so this holds or does not
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(uniform[lag:], uniform[:-lag])[0, 1]) < 4 / count**0.5
