"""Sampling of each CPU body: the rules one by one, both bodies alike, frequencies, and bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.paged_batch import same_bits
from torch import Tensor

from ellm.kernels import noise
from ellm.kernels.dispatch import select
from ellm.kernels.ops import Ops, SamplingBatch

INF = float("inf")


@pytest.fixture(params=["torch", pytest.param("numba", marks=pytest.mark.needs_module("numba"))])
def ops(request: pytest.FixtureRequest) -> Ops:
    return select("cpu", jit=request.param == "numba", deterministic=False)


def batch(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingBatch:
    """One setting for all rows; the rows differ in their output index."""
    return SamplingBatch(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k) if top_k else None,
        top_p=torch.full((rows,), top_p) if top_p < 1 else None,
        min_p=torch.full((rows,), min_p) if min_p else None,
        seeds=torch.full((rows,), 42),
        choice_index=torch.zeros(rows, dtype=torch.int64),
        output_index=torch.arange(rows),
    )


GREEDY = SamplingBatch(*[None] * 7)
ROWS = 4000


def drawn(ops: Ops, logits: list[float], **settings: float) -> Tensor:
    """How often each token comes, in ROWS draws."""
    rows = torch.tensor(logits).expand(ROWS, -1).contiguous()
    return torch.bincount(ops.sample(rows, batch(ROWS, **settings)), minlength=len(logits))  # type: ignore


def chi_square(counts: Tensor, logits: list[float], temperature: float = 1.0) -> float:
    expected = (torch.tensor(logits).double() / temperature).softmax(0) * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(ops: Ops, temperature: float) -> None:
    logits = [0.3, -1.0, 2.0, 1.0, 0.0, -INF, 1.5, -0.5, 0.9, -2.0]
    counts = drawn(ops, logits, temperature=temperature)
    assert chi_square(counts, logits, temperature) < 26.1  # 8 degrees of freedom: 1 in 1000


def test_cut_frequencies_follow_the_renormalised_softmax(ops: Ops) -> None:
    logits = [1.0, 0.0, 2.0, -1.0, 1.5]
    by_k = [1.0, -INF, 2.0, -INF, 1.5]
    assert chi_square(drawn(ops, logits, top_k=3), by_k) < 13.8  # 2 degrees of freedom
    # softmax: .1966 .0723 .5344 .0266 .3241 of 1.154, in order .463 .281 .170 .063 .023
    assert chi_square(drawn(ops, logits, top_p=0.8), by_k) < 13.8
    assert chi_square(drawn(ops, logits, min_p=0.3), by_k) < 13.8
    # top-p counts within what top-k kept: 2.0 alone is 0.507 of the three.
    assert drawn(ops, logits, top_k=3, top_p=0.5).tolist() == [0, 0, ROWS, 0, 0]
    assert chi_square(drawn(ops, logits, top_k=3, top_p=0.51), [-INF, -INF, 2.0, -INF, 1.5]) < 10.8


def test_ties_at_a_cut_go_to_the_lower_ids(ops: Ops) -> None:
    logits = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert (drawn(ops, logits, top_k=4) > 0).tolist() == [True, True, True, True, False, False]
    assert (drawn(ops, [0.0] * 8, top_p=0.3) > 0).tolist() == [True] * 3 + [False] * 5
    assert (drawn(ops, [0.0, -0.0] * 3, top_k=2) > 0).tolist() == [True, True] + [False] * 4


def test_greedy_takes_the_lowest_of_equals(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, -0.0, 0.0], [-INF, -INF, -5.0], [-INF, -INF, -INF]])
    assert ops.sample(logits, GREEDY).tolist() == [1, 0, 2, 0]
    assert ops.sample(logits, batch(4, temperature=0.0)).tolist() == [1, 0, 2, 0]
    assert ops.sample(torch.zeros(0, 5), GREEDY).tolist() == []
    wide = torch.zeros(2, 1000)
    wide[0, 999] = wide[1, 500] = wide[1, 501] = 1.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.sample(wide.to(dtype), GREEDY).tolist() == [999, 500]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_a_tiny_temperature_is_greedy(ops: Ops, temperature: float) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.sample(logits, batch(50, temperature=temperature)), logits.argmax(-1))


def test_extreme_settings(ops: Ops) -> None:
    logits = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    free = ops.sample(logits, batch(20))
    assert torch.equal(ops.sample(logits, batch(20, top_p=0.0)), best)
    assert torch.equal(ops.sample(logits, batch(20, top_k=1)), best)
    assert torch.equal(ops.sample(logits, batch(20, min_p=1.0)), best)
    assert torch.equal(ops.sample(logits, batch(20, top_k=10**12)), free)
    assert torch.equal(ops.sample(logits, batch(20, top_p=1.0 - 1e-7, min_p=1e-30)), free)
    banned = torch.full_like(logits, -INF)
    banned[:, 17] = -1e30
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 1e-6}):
        assert ops.sample(banned, batch(20, **settings)).tolist() == [17] * 20  # type: ignore[arg-type]
    wild = torch.tensor([[3e38, -3e38, 3e38, 0.0]]).expand(50, -1).contiguous()
    assert set(ops.sample(wild, batch(50)).tolist()) == {0, 2}


def test_noise_is_the_documented_one(ops: Ops) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1))
    settings = replace(batch(64), seeds=torch.arange(64) * -(10**17), choice_index=torch.arange(64) % 5)
    assert settings.seeds is not None
    assert settings.choice_index is not None
    assert settings.output_index is not None
    keys = noise.row_keys(settings.seeds, settings.choice_index, settings.output_index)
    scores = (logits - logits.amax(-1, keepdim=True)).double() + noise.gumbel(
        keys.unsqueeze(1), torch.arange(1000)
    )
    assert torch.equal(ops.sample(logits, settings), scores.argmax(-1))


def test_each_counter_changes_the_draw(ops: Ops) -> None:
    logits = torch.zeros(100, 5000)
    base = replace(batch(100), output_index=torch.zeros(100, dtype=torch.int64))
    assert len(set(ops.sample(logits, base).tolist())) == 1
    for name in ("seeds", "choice_index", "output_index"):
        assert len(set(ops.sample(logits, replace(base, **{name: torch.arange(100)})).tolist())) > 90


def test_bias_and_penalties(ops: Ops) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0], [2.0, -1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    settings = SamplingBatch(
        *[None] * 7,
        penalty_cu=torch.tensor([0, 3, 3, 4]),
        penalty_ids=torch.tensor([0, 1, 3, 2]),
        penalty_output_counts=torch.tensor([2, 0, 1, 3]),
        repetition=torch.tensor([2.0, 9.0, 1.0]),
        presence=torch.tensor([0.25, 9.0, 0.0]),
        frequency=torch.tensor([0.5, 9.0, -1.0]),
        bias_row=torch.tensor([0, 2, 2]),
        bias_ids=torch.tensor([3, 3, 0]),
        bias=torch.tensor([-INF, 2.5, 1.0]),
    )
    from ellm.kernels.reference_sampling import adjust_logits

    # row 0: 2/2 - 2*.5 - .25; -1*2 (prompt only); untouched; banned. Row 1 has no ids. Row 2: 3 off; + bias.
    adjusted = adjust_logits(logits, settings)
    assert adjusted.tolist() == [[-0.25, -2.0, 0.5, -INF], [2.0, -1.0, 0.5, 1.0], [1.0, 0.0, 3.0, 2.5]]
    assert ops.sample(logits, settings).tolist() == [2, 0, 2]
    assert logits[0, 0] == 2.0  # the caller's logits stay


def mixed_batch(rows: int, seed: int) -> SamplingBatch:
    generator = torch.Generator().manual_seed(seed)

    def uniform(scale: float) -> Tensor:
        return scale * torch.rand(rows, generator=generator)

    temperature = uniform(2.0)
    temperature[::4] = 0.0
    return SamplingBatch(
        temperature=temperature,
        top_k=(uniform(60.0) - 10).clamp(min=0).long(),
        top_p=0.2 + uniform(1.0),
        min_p=uniform(0.05),
        seeds=torch.arange(rows) * 7919,
        choice_index=torch.arange(rows) % 3,
        output_index=torch.arange(rows) % 17,
    )


@pytest.mark.needs_module("numba")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 100, 4099])
def test_both_bodies_draw_the_same(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(80, vocab, generator=generator)).to(dtype)  # bfloat16 has many ties
    bodies = [select("cpu", jit=jit, deterministic=False) for jit in (False, True)]
    settings = mixed_batch(80, vocab)
    tokens = [body.sample(logits, settings) for body in bodies]
    assert torch.equal(*tokens)
    for num_top in (0, 1, 20):
        scores = [body.logprobs(logits, tokens[0], num_top) for body in bodies]
        torch.testing.assert_close(scores[1], scores[0], rtol=1e-6, atol=1e-5)


@pytest.mark.needs_module("numba")
def test_bits_do_not_depend_on_the_other_rows() -> None:
    ops = select("cpu", jit=True)
    logits = 2 * torch.randn(60, 1003, generator=torch.Generator().manual_seed(0))
    settings = mixed_batch(60, 0)
    tokens, scores = ops.sample(logits, settings), ops.logprobs(logits, torch.arange(60), 5)
    for count in (1, 2, 7, 59):
        pick = torch.randperm(60, generator=torch.Generator().manual_seed(count))[:count]
        part = replace(settings, **{n: getattr(settings, n)[pick] for n in settings.__slots__[:7]})
        assert torch.equal(ops.sample(logits[pick], part), tokens[pick])
        for got, expected in zip(ops.logprobs(logits[pick], pick, 5), scores, strict=True):
            assert same_bits(got, expected[pick])


def test_logprobs_ranks_and_top(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -INF], [0.0, -0.0, 0.0, 0.0]])
    logprob, rank, ids, top = ops.logprobs(logits, torch.tensor([2, 1]), 3)
    expected = logits.log_softmax(-1)
    assert rank.tolist() == [2, 2]
    assert ids.tolist() == [[1, 2, 0], [0, 1, 2]]
    torch.testing.assert_close(logprob, expected[[0, 1], [2, 1]])
    torch.testing.assert_close(top, expected.gather(1, ids))
    assert ops.logprobs(logits, torch.tensor([3, 3]), 0)[1].tolist() == [4, 4]
    assert ops.logprobs(logits, torch.tensor([3, 3]), 0)[0][0] == -INF
    assert ops.logprobs(logits, torch.tensor([0, 0]), 9)[2].shape == (2, 4)


def masked(allowed: list[list[int]], rows: list[int], vocab: int) -> dict[str, Tensor]:
    """The fields of a batch in which these rows may emit these tokens alone."""
    words = torch.zeros(len(rows), -(-vocab // 32) * 32, dtype=torch.int64)
    for i, ids in enumerate(allowed):
        words[i, ids] = 1
    packed = (words.view(len(rows), -1, 32) << torch.arange(32)).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)  # the sign is a bit like any other
    return {"mask_row": torch.tensor(rows), "masks": packed.int()}


@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 1000])
def test_a_masked_row_emits_what_its_mask_allows(ops: Ops, vocab: int) -> None:
    """Whatever bias and penalties say; other rows as without masks; both bodies alike."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(40, vocab, generator=generator)
    rows = [i for i in range(40) if i % 3]
    allowed = [
        torch.randperm(vocab, generator=generator)[: 1 + i % 5].tolist() + [vocab - 1] * (i % 2) for i in rows
    ]
    for temperature in (0.0, 1.0):
        free = replace(
            batch(40, temperature=temperature, top_k=7, top_p=0.9, min_p=0.01),
            bias_row=torch.arange(40), bias_ids=torch.arange(40) % vocab, bias=torch.full((40,), 100.0),
        )  # fmt: skip
        held = replace(free, **masked(allowed, rows, vocab))  # type: ignore[arg-type]
        kept = logits.clone()
        tokens = ops.sample(logits, held)
        assert torch.equal(logits, kept)
        for i, token in enumerate(tokens.tolist()):
            if i in rows:
                assert token in allowed[rows.index(i)]
            else:
                assert token == ops.sample(logits, free)[i]
        assert torch.equal(tokens, select("cpu", jit=False, deterministic=False).sample(logits, held))
        for dtype in (torch.bfloat16, torch.float16):
            for i, token in enumerate(ops.sample(logits.to(dtype), held).tolist()):
                assert i not in rows or token in allowed[rows.index(i)]
