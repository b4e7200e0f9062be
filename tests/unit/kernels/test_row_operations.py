"""Norms, activation, rotary embedding, KV store: the JIT against torch, and its bits anywhere in a batch."""

from __future__ import annotations

import functools

import pytest
import torch
from support.paged_batch import same_bits
from torch import Tensor

from ellm.kernels.dispatch import select
from ellm.kernels.ops import Ops
from ellm.kernels.reference import TorchOps

pytestmark = pytest.mark.needs_module("numba")

TORCH = TorchOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest value: rounding of the type, and of sums in another order.
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [(1, 512), (37, 40), (5, 77), (130, 1000), (0, 64), (3, 1), (2, 16)]


@functools.cache
def jit() -> Ops:
    return select("cpu", jit=True)


def close(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.numel():
        limit = RELATIVE[a.dtype] * max(1.0, b.abs().max().item())
        assert (a.double() - b.double()).abs().max() <= limit


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_norms_equal_torch(rows: int, n: int, dtype: torch.dtype) -> None:
    x, residual = draw(rows, n, dtype=dtype), draw(rows, n, dtype=dtype, seed=1)
    weight, bias = draw(n, dtype=dtype, seed=2), draw(n, dtype=dtype, seed=3)
    sums = [residual.clone(), residual.clone()]
    normed, total = jit().rms_norm(x, weight, 1e-5, sums[0])
    expected, expected_total = TORCH.rms_norm(x, weight, 1e-5, sums[1])
    close(normed, expected)
    assert same_bits(total, expected_total)
    assert total is sums[0]
    alone, same = jit().rms_norm(x, weight, 1e-5)
    close(alone, TORCH.rms_norm(x, weight, 1e-5)[0])
    assert same is x
    close(jit().layer_norm(x, weight, bias, 1e-5), TORCH.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_silu_mul_equals_torch(rows: int, n: int, dtype: torch.dtype) -> None:
    gate_up = draw(rows, 2 * n, dtype=dtype, scale=4.0)
    close(jit().silu_mul(gate_up), TORCH.silu_mul(gate_up))


def test_silu_of_any_float() -> None:
    gate = torch.tensor([0.0, -0.0, 1e-38, -80.0, 80.0, -100.0, 100.0, -1e38, 1e38, float("inf")])
    out = jit().silu_mul(torch.cat([gate, torch.ones(10)]).unsqueeze(0))[0]
    torch.testing.assert_close(out, torch.nn.functional.silu(gate), rtol=1e-6, atol=1e-37)
    assert jit().silu_mul(torch.tensor([[float("nan"), 1.0]])).isnan().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"), [(6, 2, 40, 40), (8, 2, 64, 64), (2, 1, 80, 32)]
)
def test_rotary_and_store_equal_torch(
    heads: int, kv_heads: int, dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    rows = 33
    cos_sin = draw(100, 2, rotary_dim // 2, dtype=torch.float32)
    positions = torch.arange(rows) * 3
    slots = torch.randperm(20 * 16, generator=torch.Generator().manual_seed(0))[:rows]
    pools = []
    for ops in (jit(), TORCH):
        rows_of_qkv = draw(rows, (heads + 2 * kv_heads) * dim, dtype=dtype).view(rows, -1, dim)
        q, k, v = rows_of_qkv.split([heads, kv_heads, kv_heads], dim=1)
        ops.rotary(q, k, positions, cos_sin)
        pool = torch.zeros(2, 20, kv_heads, 16, dim, dtype=dtype)
        ops.kv_store(k, v, slots, pool[0], pool[1])
        pools.append((q, pool))
    close(pools[0][0], pools[1][0])
    close(pools[0][1], pools[1][1])
    assert pools[0][1][1].count_nonzero() == rows * kv_heads * dim


def test_store_copies_bits() -> None:
    k = torch.full((1, 1, 24), float("nan"), dtype=torch.bfloat16)
    pool = torch.zeros(2, 3, 1, 4, 24, dtype=torch.bfloat16)
    jit().kv_store(k, -k, torch.tensor([7]), pool[0], pool[1])
    assert same_bits(pool[0, 1, 0, 3], k[0, 0])
    assert same_bits(pool[1, 1, 0, 3], -k[0, 0])
    assert pool.isnan().sum() == 48


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [512, 77])
def test_bits_do_not_depend_on_the_place_in_the_batch(n: int, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(n)
    rows = 150
    x, residual = draw(rows, n, dtype=dtype), draw(rows, n, dtype=dtype, seed=1)
    weight, bias = draw(n, dtype=dtype, seed=2), draw(n, dtype=dtype, seed=3)
    gate_up = draw(rows, 2 * n, dtype=dtype, seed=4)
    cos_sin = draw(rows, 2, n // 2, dtype=torch.float32)
    positions = torch.arange(rows)

    def results(pick: Tensor, gap: int) -> list[Tensor]:
        """Every operation on the rows picked, `gap` elements into memory of their own."""

        def place(t: Tensor) -> Tensor:
            memory = torch.empty(gap + t[pick].numel(), dtype=dtype)
            memory[gap:] = t[pick].flatten()
            return memory[gap:].view(t[pick].shape)

        q, k = place(x).unsqueeze(1), place(residual).unsqueeze(1)
        jit().rotary(q, k, positions[pick], cos_sin)
        return [
            *jit().rms_norm(place(x), weight, 1e-5, place(residual)),
            jit().layer_norm(place(x), weight, bias, 1e-5),
            jit().silu_mul(place(gate_up)),
            q,
            k,
        ]

    whole = results(positions, 0)
    for count in (1, 2, 3, 17, 64, 149):
        pick = torch.randperm(rows, generator=generator)[:count]
        for got, expected in zip(results(pick, count % 7), whole, strict=True):
            assert same_bits(got, expected[pick])
    torch.set_num_threads(before)
