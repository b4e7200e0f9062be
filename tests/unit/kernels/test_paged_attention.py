"""Paged attention of each CPU body against its definition, and the JIT's bits at any batch and chunking."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.paged_batch import Heads, PagedSequences, same_bits
from torch import Tensor

from ellm.kernels.dispatch import select
from ellm.kernels.ops import Ops

BODIES = ["torch", pytest.param("numba", marks=pytest.mark.needs_module("numba"))]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(params=BODIES)
def ops(request: pytest.FixtureRequest) -> Ops:
    return select("cpu", jit=request.param == "numba", deterministic=False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


Entry = tuple[int, int, int]  # sequence, first position, end


def attend(ops: Ops, sequences: PagedSequences, entries: list[Entry], window: int | None) -> Tensor:
    q, meta = sequences.step(entries)
    scale = sequences.heads.dim**-0.5
    return ops.paged_attention(q, sequences.k_pool, sequences.v_pool, meta, scale, window)


SHAPES = [
    Heads(8, 2, 64, 16),
    Heads(6, 2, 40, 16),
    Heads(6, 2, 48, 8),
    Heads(4, 4, 80, 16),
    Heads(4, 1, 128, 32),
    Heads(3, 3, 24, 12),
    Heads(14, 2, 16, 16),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "heads", SHAPES, ids=lambda h: f"{h.num_heads}:{h.num_kv_heads}x{h.dim}b{h.block_size}"
)
def test_equals_its_definition(ops: Ops, heads: Heads, dtype: torch.dtype) -> None:
    heads = Heads(heads.num_heads, heads.num_kv_heads, heads.dim, heads.block_size, dtype)
    sequences = PagedSequences([1, 17, 64, 150, 33, 200, 129], heads)
    entries = [(0, 0, 1), (1, 16, 17), (2, 63, 64), (3, 149, 150), (4, 0, 33), (5, 130, 200), (6, 0, 129)]
    for window in (None, 5, 100):
        out = attend(ops, sequences, entries, window).double()
        expected = torch.cat([sequences.dense(i, window)[start:end] for i, start, end in entries])
        assert out.shape == expected.shape
        assert (out - expected).abs().max() < TOLERANCE[dtype]


def test_nothing_to_do(ops: Ops) -> None:
    sequences = PagedSequences([3], Heads())
    assert attend(ops, sequences, [], None).shape == (0, 4, 64)


@pytest.mark.parametrize("dim", [64, 40])
def test_reads_views_into_a_wider_row(ops: Ops, dim: int) -> None:
    sequences = PagedSequences([40, 20], Heads(dim=dim))
    q, meta = sequences.step([(0, 39, 40), (1, 3, 20)])
    wide = torch.randn(len(q), 9, dim)
    wide[:, 2:6] = q
    pools = [torch.stack([p, p], dim=1)[:, 1] for p in (sequences.k_pool, sequences.v_pool)]
    out = ops.paged_attention(wide[:, 2:6], *pools, meta, 0.1)
    expected = ops.paged_attention(q, sequences.k_pool, sequences.v_pool, meta, 0.1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_pool_with_gaps_between_tokens(ops: Ops) -> None:
    sequences = PagedSequences([40, 20], Heads())
    q, meta = sequences.step([(0, 39, 40), (1, 3, 20)])
    pools = [torch.stack([p, p], dim=3)[:, :, :, 1] for p in (sequences.k_pool, sequences.v_pool)]
    expected = ops.paged_attention(q, sequences.k_pool, sequences.v_pool, meta, 0.1)
    torch.testing.assert_close(ops.paged_attention(q, *pools, meta, 0.1), expected, rtol=0, atol=1e-6)


@pytest.mark.needs_module("numba")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 40])
def test_what_lies_in_unused_slots_does_not_matter(dim: int, dtype: torch.dtype) -> None:
    ops = select("cpu", jit=True)
    sequences = PagedSequences([37, 3, 70], Heads(dim=dim, dtype=dtype))
    entries = [(1, 2, 3), (0, 0, 37), (2, 1, 70)]
    clean = attend(ops, sequences, entries, None)
    sequences.place(9, poison=float("nan"))
    assert same_bits(attend(ops, sequences, entries, None), clean)


def random_steps(lengths: list[int], rng: random.Random) -> Iterator[list[Entry]]:
    """Steps that together compute every row of every sequence once, in random company."""
    done = [0] * len(lengths)
    while open_ := [i for i, n in enumerate(lengths) if done[i] < n]:
        chosen = rng.sample(open_, rng.randint(1, len(open_)))
        step = []
        for i in chosen:
            rows = rng.choice([1, 1, rng.randint(1, 70), 300])
            end = min(lengths[i], done[i] + rows)
            step.append((i, done[i], end))
            done[i] = end
        yield sorted(step, key=lambda e: (e[2] - e[1] > 1, rng.random()))


@pytest.mark.needs_module("numba")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(8, 2, 64, 16),
        Heads(8, 2, 64, 16, torch.bfloat16),
        Heads(3, 1, 40, 8, torch.bfloat16),
        Heads(2, 2, 80, 16),
        Heads(6, 2, 48, 16, torch.float16),
    ],
    ids=lambda h: f"{h.dim}{h.dtype}",
)
def test_bits_do_not_depend_on_batch_chunking_or_blocks(
    heads: Heads, window: int | None, two_threads: None
) -> None:
    ops = select("cpu", jit=True)
    lengths = [1, 30, 65, 131, 300]
    sequences = PagedSequences(lengths, heads)
    whole = [attend(ops, sequences, [(i, 0, n)], window) for i, n in enumerate(lengths)]
    alone = [attend(ops, sequences, [(4, p, p + 1)], window) for p in (0, 15, 16, 63, 64, 130, 299)]
    assert same_bits(torch.cat(alone), whole[4][[0, 15, 16, 63, 64, 130, 299]])
    for seed in range(6):
        sequences.place(seed)
        for entries in random_steps(lengths, random.Random(seed)):
            expected = torch.cat([whole[i][start:end] for i, start, end in entries])
            assert same_bits(attend(ops, sequences, entries, window), expected)


@pytest.mark.needs_module("numba")
def test_a_block_outside_the_pool_is_refused() -> None:
    ops = select("cpu", jit=True)
    sequences = PagedSequences([40, 20], Heads())
    q, meta = sequences.step([(0, 39, 40), (1, 3, 20)])
    for wrong in (-1, len(sequences.k_pool)):
        meta.block_tables[1, 0] = wrong
        fresh = replace(meta)
        with pytest.raises(AssertionError):
            ops.paged_attention(q, sequences.k_pool, sequences.v_pool, fresh, 0.1)
    k = torch.zeros(1, 2, 64)
    with pytest.raises(AssertionError, match="slot_mapping"):
        ops.kv_store(k, k, torch.tensor([16 * len(sequences.k_pool)]), sequences.k_pool, sequences.v_pool)
