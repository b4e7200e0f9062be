"""Cases of what a step does around attention and norms: heads on their way to the pool, linear layers that
keep their bits, tokens, copies of blocks; and the list of all cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate, product

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform, SamplingBatch
from ellm.kernels.triton_attention_cases import attention_cases
from ellm.kernels.triton_cases import (
    DTYPES,
    POISON,
    Body,
    Case,
    Draw,
    Scale,
    head_cases,
    joined_heads,
    name_of,
    row_cases,
)


def cases(scale: Scale, *, quick: bool) -> Iterator[Case]:
    """Every kernel in every configuration; `quick` takes each tile, type and head dimension once."""
    yield from row_cases(scale, quick)
    yield from head_cases(scale, quick)
    yield from _rotary_store_cases(scale, quick)
    yield from _linear_cases(scale, quick)
    yield from _token_cases(scale, quick)
    yield from _copy_cases(scale, quick)
    yield from attention_cases(scale, quick)


_Heads = tuple[torch.dtype, int, int, int, int, int]  # type, rows, H, K, D, half of the rotary dimension


def _rotary_store_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    for dtype, dim, rows in product(scale.dtypes, scale.dims, scale.rows):
        if quick and (dim not in scale.few_dims or rows == 1):
            continue
        for heads, kv_heads in scale.heads[: 1 if quick else None]:
            for half, norms in ((dim // 4, True), (dim // 2, False), (dim // 2, True))[
                : 2 if quick else None
            ]:
                at = (dtype, rows, heads, kv_heads, dim, half)
                detail = f"{name_of(dtype)} {rows} rows {heads}:{kv_heads}x{dim} of {2 * half}"
                detail += " normed" if norms else ""
                yield Case("rotary_store", detail, dtype, partial(_rotary_store, at=at, norms=norms))
    at = (scale.dtypes[-1], 4, *scale.heads[0], scale.dims[0], scale.dims[0] // 2)
    yield Case(
        "rotary_store",
        "a row without a slot changes nothing",
        scale.dtypes[-1],
        partial(_rotary_store, at=at, norms=True, absent=True),
        again=partial(_rotary_store, at=at, norms=True, dropped=True),
    )


def _rotary_store(
    body: Body, device: torch.device, at: _Heads, norms: bool, absent: bool = False, dropped: bool = False
) -> list[Tensor]:
    """`absent`: the last row has no slot. `dropped`: it is not there at all."""
    dtype, rows, heads, kv, dim, half = at
    draw = Draw(device, dtype)
    _, q, k, v = joined_heads(draw, rows, heads, kv, dim)
    cos_sin = draw(2 * rows + 1, 2, half, dtype=torch.float32)
    transform = HeadTransform(
        draw(dim) if norms else None, draw(dim) if norms else None, 1e-5, cos_sin.contiguous()
    )
    pool = torch.full((2, rows // 4 + 2, kv, 16, dim), POISON, dtype=dtype, device=device)
    slots = draw.order(pool.shape[1] * 16)[:rows].to(device)
    positions = (2 * torch.arange(rows)).to(device)
    if absent:
        slots[-1] = -1
    if dropped:
        q, k, v, slots, positions = q[:-1], k[:-1], v[:-1], slots[:-1], positions[:-1]
    out = body.ops.rotary_store(q, k, v, _places(positions, slots), (pool[0], pool[1]), transform)
    return [out[: rows - 1] if absent or dropped else out, pool]


def _places(positions: Tensor, slots: Tensor) -> AttentionMeta:
    """What a store reads of it: rows at these positions go to these slots."""
    entries = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
    tables = torch.zeros((len(positions), 1), dtype=torch.int32, device=positions.device)
    return AttentionMeta(
        entries, positions.int() + 1, tables, positions, slots, len(positions), 1, entries[:-1]
    )


def _linear_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    for dtype, (num_in, num_out) in product(scale.dtypes, scale.linears[: 1 if quick else None]):
        detail = f"{name_of(dtype)} {num_in} to {num_out}"
        for rows in (*scale.rows[: 2 if quick else None], 70):
            run = partial(_linear, at=(dtype, rows, num_in, num_out), biased=rows != 1)
            yield Case("linear", f"{detail} {rows} rows", dtype, run)
        at = (dtype, 70, num_in, num_out)
        alone = partial(_linear_rows, at=at, counts=(1, 2, 3, 1))
        yield Case(
            "linear",
            f"{detail} bits of a row alone = in company",
            dtype,
            alone,
            again=partial(_linear_rows, at=at, counts=(70,)),
        )


_Linear = tuple[torch.dtype, int, int, int]  # type, rows, inputs, outputs


def _linear(body: Body, device: torch.device, at: _Linear, biased: bool) -> list[Tensor]:
    dtype, rows, num_in, num_out = at
    draw = Draw(device, dtype)
    weight = draw(num_out, num_in) / num_in**0.5
    return [body.linear(draw.rows(rows, num_in, body.poison), weight, draw(num_out) if biased else None)]


def _linear_rows(body: Body, device: torch.device, at: _Linear, counts: tuple[int, ...]) -> list[Tensor]:
    """The first seven rows of a batch, in batches of these sizes."""
    dtype, rows, num_in, num_out = at
    draw = Draw(device, dtype)
    weight, bias = draw(num_out, num_in), draw(num_out)
    x = draw.rows(rows, num_in, body.poison)
    ends = list(accumulate(counts))
    parts = [body.linear(x[end - n : end], weight, bias) for n, end in zip(counts, ends, strict=True)]
    return [torch.cat(parts)[:7]]


def _token_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    kinds = ("ties", "all", "extreme", "drawn", "greedy", "top-k", "top-p", "min-p", "adjusted")
    for dtype, vocab, rows in product(scale.dtypes, scale.vocabs[: 1 if quick else None], (0, 1, 5)):
        detail = f"{name_of(dtype)} {rows}x{vocab}"
        for kind in (kinds[DTYPES.index(dtype)],) if quick else kinds:
            if quick and rows == 1:
                continue
            run = partial(_sample, at=(dtype, rows, vocab), kind=kind)
            yield Case("sample", f"{detail} {kind}", dtype, run, exact=True)
        if rows != 1 or not quick:
            yield Case("logprobs", detail, torch.float32, partial(_logprobs, at=(dtype, rows, vocab)))
    at = (scale.dtypes[0], 5, scale.vocabs[0])
    alone = partial(_one_token, at=at, row=3, company=False)
    company = partial(_one_token, at=at, row=3, company=True)
    yield Case("sample", "a row alone = in company", scale.dtypes[0], alone, again=company)


_Tokens = tuple[torch.dtype, int, int]  # type, rows, vocabulary


def _batch(draw: Draw, device: torch.device, at: _Tokens, kind: str) -> SamplingBatch:
    """Rows differ in all that the kind has; every third is greedy. "cut" is "all" without adjustments."""
    _, rows, vocab = at
    number = torch.arange(rows)
    every = kind in ("all", "cut")

    def given(wanted: bool, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return values.to(device, dtype) if wanted else None

    drawn = kind not in ("greedy", "adjusted")
    batch = SamplingBatch(
        temperature=given(drawn, torch.where(number % 3 == 1, 0.0, 0.5 + 0.3 * number)),
        top_k=given(every or kind == "top-k", (number % 4) * 7, torch.int64),
        top_p=given(every or kind == "top-p", 1.0 - 0.2 * (number % 5)),
        min_p=given(every or kind == "min-p", 0.03 * (number % 3)),
        seeds=given(drawn, number * 7919 - 5, torch.int64),
        choice_index=given(drawn, number % 2, torch.int64),
        output_index=given(drawn, 3 * number, torch.int64),
    )
    if kind not in ("all", "adjusted") or rows == 0:
        return batch
    ids = torch.stack([draw.order(vocab)[:9] for _ in range(rows)])
    words = torch.full((1, -(-vocab // 32)), 0x5B5B5B5B, dtype=torch.int32, device=device)
    return replace(
        batch,
        penalty_cu=given(True, 9 * torch.arange(rows + 1), torch.int64),
        penalty_ids=given(True, ids.flatten(), torch.int64),
        penalty_output_counts=given(True, torch.arange(9 * rows) % 3, torch.int64),
        repetition=given(True, 1.0 + 0.1 * number),
        presence=given(True, 0.3 * (number % 2)),
        frequency=given(True, 0.2 * (number % 3)),
        bias_row=given(True, torch.tensor([0, 0, rows - 1]), torch.int64),
        bias_ids=given(True, torch.tensor([2, vocab - 1, 3]), torch.int64),
        bias=given(True, torch.tensor([4.0, float("-inf"), -2.0])),
        mask_row=given(True, torch.tensor([rows // 2]), torch.int64),
        masks=words,
    )


def _sample(body: Body, device: torch.device, at: _Tokens, kind: str) -> list[Tensor]:
    dtype, rows, vocab = at
    draw = Draw(device, dtype)
    logits = draw.rows(rows, vocab, body.poison).mul_(3)
    if kind == "ties":
        logits.round_()
    batch = _batch(draw, device, at, {"ties": "all", "extreme": "cut"}.get(kind, kind))
    if kind == "extreme" and rows:
        assert batch.temperature is not None
        assert batch.top_k is not None
        assert batch.top_p is not None
        batch.temperature[0] = 1e-30
        batch.top_k[2::2] = 10**12
        batch.top_p[2::2] = 0.0
        logits[rows // 2, 1:] = float("-inf")
    return [body.ops.sample(logits, batch)]


def _one_token(body: Body, device: torch.device, at: _Tokens, row: int, company: bool) -> list[Tensor]:
    """The token of one row, drawn by itself or beside the others."""
    dtype, rows, vocab = at
    draw = Draw(device, dtype)
    logits, batch = draw.rows(rows, vocab, body.poison).mul_(3), _batch(draw, device, at, "cut")
    if company:
        return [body.ops.sample(logits, batch)[row : row + 1]]
    settings = {f: getattr(batch, f) for f in batch.__slots__}
    own = {f: x[row : row + 1].contiguous() for f, x in settings.items() if x is not None}
    return [body.ops.sample(logits[row : row + 1], replace(batch, **own))]


def _logprobs(body: Body, device: torch.device, at: _Tokens) -> list[Tensor]:
    dtype, rows, vocab = at
    draw = Draw(device, dtype)
    logits = draw.rows(rows, vocab, body.poison).mul_(3)
    if rows:
        logits[0, 0] = float("-inf")
    tokens = (torch.arange(rows) * 5 % vocab).to(device)
    return list(body.ops.logprobs(logits, tokens, 4))


def _copy_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    for dtype, dim, count in product(scale.dtypes, scale.dims[: 1 if quick else None], (0, 1, 6)):
        for size in (16,) if quick else (16, 5):
            detail = f"{name_of(dtype)} {count} blocks of {size} x{dim}"
            run = partial(_kv_copy, at=(dtype, count, dim, size))
            yield Case("kv_copy", detail, dtype, run, exact=True)


def _kv_copy(body: Body, device: torch.device, at: tuple[torch.dtype, int, int, int]) -> list[Tensor]:
    """From a pool, layers outside, to a buffer, blocks outside, and on to another pool."""
    dtype, count, dim, size = at
    draw = Draw(device, dtype)
    pool = draw(2, 3, 8, 1, size, dim).transpose(0, 1)
    pool[:, :, 2] = POISON
    buffer = torch.full((9, 3, 2, 1, size, dim), POISON, dtype=dtype, device=device)
    other = torch.full((2, 3, 10, 1, size, dim), POISON, dtype=dtype, device=device).transpose(0, 1)
    there = torch.stack((draw.order(8)[:count], draw.order(9)[:count]), 1).to(device)
    back = torch.stack((there[:, 1].cpu(), draw.order(10)[:count]), 1).to(device)
    body.ops.kv_copy(pool, buffer.permute(1, 2, 0, 3, 4, 5), there)
    body.ops.kv_copy(buffer.permute(1, 2, 0, 3, 4, 5), other, back)
    return [buffer, other]
