"""Cases of the Triton kernels: each runs one operation of a given body, on inputs it draws itself.

The same case serves three ends: a kernel against its torch twin (`triton_check`), the launches that are
compiled ahead of time (`triton_aot`), and the same on a GPU. Memory that nobody owns is NaN for a kernel and
0 for its twin, which may read what it masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_tiles import TileChoice, tile_choices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (32, 64, 80, 96, 128, 256)
POISON = float("nan")


# Queries, keys, values, where they stand, scale, window.
AttentionArgs = tuple[Tensor, Tensor, Tensor, AttentionMeta, float, int | None]


class Body(Protocol):
    """The operations under test, and what fills memory that nobody owns."""

    poison: float
    ops: Any

    def attend(self, choice: TileChoice, args: AttentionArgs) -> Tensor:
        """Paged attention by these tiles, where the body has tiles."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [R, in], weight [out, in] -> [R, out]."""
        ...


Entries = tuple[tuple[int, int, int], ...]  # (sequence, first position, end); single rows first
Run = Callable[[Body, torch.device], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Case:
    """`run` gives every tensor that the operation wrote, unowned memory included. `again`, where given, gives
    the same by another way on the same body, and bits must agree; else the twin's result is the yardstick."""

    kernel: str
    detail: str
    dtype: torch.dtype
    run: Run
    again: Run | None = None
    exact: bool = False  # the twin's bits are the yardstick


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the cases are."""

    sizes: tuple[int, ...]  # of a row
    rows: tuple[int, ...]
    context: int  # tokens of the longest sequence; the others are shorter
    split_tokens: int | None  # None: as in service
    heads: tuple[tuple[int, int], ...]  # (H, K)
    dims: tuple[int, ...] = DIMS
    few_dims: tuple[int, ...] = DIMS  # of attention in types other than bfloat16, where it shall be quick
    exact_dims: tuple[int, ...] = DIMS  # of the cases that compare bits, where it shall be quick
    dtypes: tuple[torch.dtype, ...] = DTYPES
    linears: tuple[tuple[int, int], ...] = ((4096, 4096),)  # inputs, outputs
    vocabs: tuple[int, ...] = (128256,)


TINY = Scale(
    (1, 48, 256),
    (0, 1, 5),
    150,
    64,
    ((4, 2), (3, 1)),
    few_dims=(64, 256),
    exact_dims=(64,),
    linears=((200, 130), (33, 7)),
    vocabs=(1100, 33),
)
REAL = Scale((128, 4096, 14336), (0, 1, 300), 5000, None, ((32, 8), (14, 2), (8, 8)))
# For the compiler: types, widths and what divides them, not numbers of rows.
COMPILED = Scale((128, 4096, 14336), (2,), 600, None, ((32, 8), (14, 2), (8, 8)))
QUICKLY_COMPILED = Scale((4096,), (2,), 600, None, ((32, 8),), (128,), dtypes=(torch.bfloat16,))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Draw:
    """Random tensors that are the same for every body."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator)
        return drawn.to(dtype or self._dtype).to(self._device)

    def order(self, count: int) -> Tensor:
        """A permutation, int64, on the CPU."""
        return torch.randperm(count, generator=self._generator)

    def rows(self, rows: int, size: int, poison: float) -> Tensor:
        """[rows, size], a view into wider rows of poison."""
        wide = torch.full((rows, size + 3), poison, dtype=self._dtype, device=self._device)
        wide[:, 2 : size + 2] = self(rows, size)
        return wide[:, 2 : size + 2]


def row_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    for dtype, size, rows in product(scale.dtypes, scale.sizes, scale.rows):
        if quick and rows == 1 and size != scale.sizes[0]:
            continue
        detail, at = f"{name_of(dtype)} {rows}x{size}", (dtype, rows, size)
        yield Case("rms_norm", detail, dtype, partial(_rms_norm, at=at, adds=False))
        yield Case("rms_norm", f"{detail} residual", dtype, partial(_rms_norm, at=at, adds=True))
        yield Case("layer_norm", detail, dtype, partial(_layer_norm, at=at))
        yield Case("silu_mul", detail, dtype, partial(_silu_mul, at=at))


_Rows = tuple[torch.dtype, int, int]  # type, rows, elements of a row
_HeadRows = tuple[torch.dtype, int, int, int, int]  # type, rows, H, K, D


def _rms_norm(body: Body, device: torch.device, at: _Rows, adds: bool) -> list[Tensor]:
    dtype, rows, size = at
    draw = Draw(device, dtype)
    x, weight = draw.rows(rows, size, body.poison), draw(size)
    residual = draw(rows, size) if adds else None
    return list(body.ops.rms_norm(x, weight, 1e-5, residual))


def _layer_norm(body: Body, device: torch.device, at: _Rows) -> list[Tensor]:
    dtype, rows, size = at
    draw = Draw(device, dtype)
    x = draw.rows(rows, size, body.poison)
    return [body.ops.layer_norm(x, draw(size), draw(size), 1e-5)]


def _silu_mul(body: Body, device: torch.device, at: _Rows) -> list[Tensor]:
    dtype, rows, size = at
    return [body.ops.silu_mul(Draw(device, dtype).rows(rows, 2 * size, body.poison).mul_(4))]


def head_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    for dtype, dim, rows in product(scale.dtypes, scale.dims, scale.rows):
        for heads, kv_heads in scale.heads[: 1 if quick else None]:
            at = (dtype, rows, heads, kv_heads, dim)
            detail = f"{name_of(dtype)} {rows} rows {heads}:{kv_heads}x{dim}"
            for half in (dim // 2,) if quick else (dim // 2, dim // 4):
                run = partial(_rotary, at=at, half=half)
                yield Case("rotary", f"{detail} of {2 * half}", dtype, run)
            yield Case("kv_store", detail, dtype, partial(_kv_store, at=at))


def joined_heads(draw: Draw, rows: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    """(all, q, k, v), the last three as views into rows that hold all heads."""
    joined = draw(rows, heads + 2 * kv_heads, dim)
    return joined, *joined.split_with_sizes([heads, kv_heads, kv_heads], 1)


def _rotary(body: Body, device: torch.device, at: _HeadRows, half: int) -> list[Tensor]:
    dtype, rows, heads, kv, dim = at
    draw = Draw(device, dtype)
    joined, q, k, _ = joined_heads(draw, rows, heads, kv, dim)
    cos_sin = draw(2 * rows + 1, 2, half, dtype=torch.float32)
    body.ops.rotary(q, k, (2 * torch.arange(rows)).to(device), cos_sin)
    return [joined]


def _kv_store(body: Body, device: torch.device, at: _HeadRows) -> list[Tensor]:
    dtype, rows, heads, kv, dim = at
    draw = Draw(device, dtype)
    _, _, k, v = joined_heads(draw, rows, heads, kv, dim)
    pool = torch.full((2, rows // 4 + 2, kv, 16, dim), POISON, dtype=dtype, device=device)
    slots = draw.order(pool.shape[1] * 16)[:rows].to(device)
    body.ops.kv_store(k, v, slots, pool[0], pool[1])
    return [pool]


@dataclass(frozen=True, slots=True)
class _Layer:
    dtype: torch.dtype
    dim: int
    heads: tuple[int, int]  # (H, K)
    window: int | None
    choice: TileChoice
    block_size: int
    context: int

    @property
    def entries(self) -> Entries:
        """Decode rows; a later chunk, a whole prompt, and what a decode row has recomputed: its own entry."""
        long, size = self.context, self.block_size
        decode = ((0, 0, 1), (2, long - 1, long), (1, size, size + 1))
        return (*decode, (3, long // 3, long // 2), (1, 0, size + 1), (2, 0, 2 * size - 3))


def attention_cases(scale: Scale, quick: bool) -> Iterator[Case]:
    number = 0
    for dtype, dim, heads in product(scale.dtypes, scale.dims, scale.heads):
        if quick and not _is_quick(scale, dtype, dim, heads):
            continue
        for choice in tile_choices(dtype, dim, heads[0] // heads[1]):
            windows = (None, scale.context // 5)
            number += 1
            for window in windows[number % 2 :][:1] if quick else windows:
                tiles = choice
                if scale.split_tokens is not None:
                    tiles = replace(choice, split_tokens=max(scale.split_tokens, choice.decode.keys))
                block_size = (16, 8, 32, 12)[number % 4]
                layer = _Layer(dtype, dim, heads, window, tiles, block_size, scale.context)
                detail = f"{name_of(dtype)} {heads[0]}:{heads[1]}x{dim} window {window or '-'} {choice.name}"
                entries = layer.entries[1::2] if quick else layer.entries
                yield _attention_case(detail, layer, entries)
        if not quick or dim in scale.exact_dims:
            yield from _exact_cases(f"{name_of(dtype)} {heads[0]}:{heads[1]}x{dim}", layer)
    yield _attention_case("no rows", layer, ())


def _is_quick(scale: Scale, dtype: torch.dtype, dim: int, heads: tuple[int, int]) -> bool:
    dims = scale.dims if dtype == torch.bfloat16 else scale.few_dims
    return dim in dims and heads == scale.heads[scale.dims.index(dim) % len(scale.heads)]


def _attention_case(detail: str, layer: _Layer, entries: Entries) -> Case:
    kernel = "fused_attention" if layer.choice.fused else "paged_attention"
    return Case(kernel, detail, layer.dtype, partial(_attention, layer=layer, entries=entries))


def _exact_cases(detail: str, strict: _Layer) -> Iterator[Case]:
    """A row has the same bits in any company; with the tiles of STRICT (`strict`) in a chunk, too, and beside
    recomputed rows in one launch."""
    long = strict.context
    singles: Entries = ((0, 0, 1), (3, long // 4, long // 4 + 1))

    def in_company(body: Body, device: torch.device) -> list[Tensor]:
        return [_attention(body, device, strict, (*singles, (2, long - 1, long)))[0][:2]]

    def chunks(body: Body, device: torch.device) -> list[Tensor]:
        return _attention(body, device, strict, ((2, long - 5, long), (1, 0, 3)))

    def row_by_row(body: Body, device: torch.device) -> list[Tensor]:
        rows = [(2, i, i + 1) for i in range(long - 5, long)] + [(1, i, i + 1) for i in range(3)]
        return _attention(body, device, strict, tuple(rows))

    detail = f"{detail} bits of decode"
    alone = _attention_case(detail, strict, singles)
    yield replace(alone, detail=f"{detail} alone = beside a longer one", again=in_company)
    yield Case(alone.kernel, f"{detail} = in a chunk", strict.dtype, row_by_row, again=chunks)
    fused = replace(strict, choice=replace(strict.choice, fused=True))
    both = _attention_case(
        f"{detail.removesuffix(' bits of decode')} {fused.choice.name}", fused, fused.entries
    )
    apart = _attention_case("", strict, fused.entries).run
    yield from (both, replace(both, detail=f"{both.detail} = two launches", again=apart))


def _attention(body: Body, device: torch.device, layer: _Layer, entries: Entries) -> list[Tensor]:
    long, size = layer.context, layer.block_size
    lengths = (1, size + 1, long, long // 2)
    draw = Draw(device, layer.dtype)
    num_heads, num_kv = layer.heads
    counts = [-(-n // size) for n in lengths]
    order = 1 + draw.order(sum(counts) + 2)  # block 0 is nobody's, and pads the tables
    pools = torch.full(
        (2, len(order) + 1, num_kv, size, layer.dim), body.poison, dtype=layer.dtype, device=device
    )
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for i, n in enumerate(lengths):
        own = order[sum(counts[:i]) :][: counts[i]]
        tables[i, : counts[i]] = own.int()
        at = torch.arange(n)
        pools[:, own[at // size].to(device), :, (at % size).to(device)] = draw(n, 2, num_kv, layer.dim)
    meta = _meta(entries, tables, size, device)
    q = draw(int(meta.cu_seqlens_q[-1]), num_heads + 1, layer.dim)[:, 1:]
    args = (q, pools[0], pools[1], meta, layer.dim**-0.5, layer.window)
    return [body.attend(layer.choice, args)]


def _meta(entries: Entries, tables: Tensor, block_size: int, device: torch.device) -> AttentionMeta:
    counts = torch.tensor([end - start for _, start, end in entries], dtype=torch.int64)
    starts = torch.tensor([start for _, start, _ in entries], dtype=torch.int64)
    ends = torch.tensor([end for _, _, end in entries], dtype=torch.int32)
    cu = torch.zeros(len(entries) + 1, dtype=torch.int64)
    cu[1:] = counts.cumsum(0)
    row_entry = torch.repeat_interleave(torch.arange(len(entries)), counts)
    positions = torch.arange(int(cu[-1])) - cu[row_entry] + starts[row_entry]
    own = tables[[i for i, _, _ in entries]]
    slots = own[row_entry, positions // block_size].long() * block_size + positions % block_size
    singles = [end - start == 1 for _, start, end in entries]
    return AttentionMeta(
        cu_seqlens_q=cu.int().to(device),
        kv_lens=ends.to(device),
        block_tables=own.to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        num_decode=(*singles, False).index(False),
        max_kv_len=max((end for _, _, end in entries), default=0),
        row_entry=row_entry.int().to(device),
        num_recompute=int(bool(entries) and not singles[-1]),  # the last has what a hole has
    )
