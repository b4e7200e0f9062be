"""Cases of the Triton kernels: each runs one operation of a given body, on inputs it draws itself.

The same case serves three ends: a kernel against its torch twin (`triton_check`), the launches that are
compiled ahead of time (`triton_aot`), and the same on a GPU. Memory that nobody owns is NaN for a kernel and
0 for its twin, which may read what it masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_tiles import TileChoice

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
