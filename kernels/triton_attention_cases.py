"""Cases of attention: every tile, decode rows beside chunks and recomputed rows, and bits that must agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_cases import Body, Case, Draw, Entries, Scale, name_of
from ellm.kernels.triton_tiles import TileChoice, tile_choices


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
