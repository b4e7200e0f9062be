"""Tiles of the Triton attention: which there are for a shape and which is taken, and the launches.

The lists are short and fixed: what is chosen depends on the layer's shape and type alone, so no kernel is
tuned, and no result changes, while requests are served. Sizes fit the registers and the shared memory of
sm_90 (227 KiB per block), as `ellm kernels check --aot sm_90` prints them; which is fastest has not been
measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_attention_kernels import attend_both_kernel, attend_kernel, join_kernel
from ellm.kernels.triton_floats import OPTIONS

SPLIT_TOKENS = 512  # a part of a decode row's keys
LOG2_E = 1.4426950408889634
LARGEST_DIM = 256


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share of the work, and how it is compiled."""

    rows: int  # rows times query heads of a group
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.keys}w{self.num_warps}s{self.num_stages}"


@dataclass(frozen=True, slots=True)
class TileChoice:
    """The tiles of both kinds of rows, and after how many tokens, a multiple of the tiles', decode rows start
    afresh. `same_sums`: others do so too, and decode rows have the bits that they would have in a chunk.
    `fused`: where rows of a hole are computed again, decode rows share their launch."""

    decode: Tile
    prefill: Tile
    same_sums: bool = False
    split_tokens: int = SPLIT_TOKENS
    fused: bool = False

    @property
    def name(self) -> str:
        marks = f"{'=' if self.same_sums else ''}{'|' if self.fused else ''}"
        return f"{self.decode.name}+{self.prefill.name}{marks}"


def tile_choices(dtype: torch.dtype, dim: int, group: int) -> tuple[TileChoice, ...]:
    """What may be used for a head dimension and `group` query heads per key/value head; the first is taken
    where speed counts, the last where STRICT does."""
    least = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:  # no tensor cores at full precision: registers set the size
        small = Tile(least, 32 if dim <= 128 else 16, 8)
        chunks = Tile(max(32, least), small.keys, 8)
        return TileChoice(small, chunks), TileChoice(small, small, same_sums=True)
    if dim > 128:
        decode, prefill = Tile(least, 32, 4, 3), Tile(max(64, least), 32, 8)
        others = [TileChoice(Tile(least, 64), Tile(max(64, least), 64, 8))]
    else:
        decode, prefill = Tile(least, 64, 4, 3), Tile(max(128, least), 64, 8)
        others = [TileChoice(Tile(least, 128, 8), Tile(max(64, least), 64, 4))]
    both = Tile(max(64, least), 32, 8) if dim > 128 else Tile(max(64, least), 64, 8)
    return TileChoice(decode, prefill), *others, TileChoice(both, both, same_sums=True)


@cache
def served_choice(dtype: torch.dtype, dim: int, group: int, strict: bool, fused: bool) -> TileChoice:
    """The tiles of a layer in service."""
    return replace(tile_choices(dtype, dim, group)[-1 if strict else 0], fused=fused)


def apart(choice: TileChoice) -> TileChoice:
    """The same tiles, each kind in a launch of its own."""
    return replace(choice, fused=False) if choice.fused else choice


def fuses(meta: AttentionMeta, choice: TileChoice) -> bool:
    """Whether these rows take one launch: where none are computed again, nothing changes."""
    return choice.fused and meta.may_fuse and meta.num_recompute > 0 and meta.num_decode > 0


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    sliding_window: int | None = None,
    choice: TileChoice | None = None,
) -> Tensor:
    """q [R, H, D] over k_cache, v_cache [N, K, B, D] -> [R, H, D] in q's dtype; sums in float32."""
    num_rows, num_heads, dim = q.shape
    num_kv = k_cache.shape[1]
    assert q.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
    assert dim <= LARGEST_DIM
    assert num_heads % num_kv == 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    chosen = choice or tile_choices(q.dtype, dim, num_heads // num_kv)[0]
    layer = _Layer(q, k_cache, v_cache, meta, scale, sliding_window)
    later_split = chosen.split_tokens if chosen.same_sums else 0
    if fuses(meta, chosen):
        layer.both(out, chosen, later_split)
        return out
    if meta.num_decode:
        layer.decode(out, chosen.decode, chosen.split_tokens)
    if meta.num_decode < num_rows:
        layer.prefill(out, chosen.prefill, later_split)
    return out


class _Layer:
    """The arguments that all launches of one call share."""

    def __init__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
    ) -> None:
        self._tensors = (q, k_cache, v_cache)
        self._meta = meta
        self._places = (meta.cu_seqlens_q, meta.kv_lens, meta.block_tables, meta.positions)
        self._window = window or 0
        _, self._heads, dim = q.shape
        self._kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
        self._dim: dict[str, Any] = {
            "DIM": dim,
            "PADDED": max(16, triton.next_power_of_2(dim)),
            "HAS_WINDOW": window is not None,
        }
        self._layout: dict[str, Any] = {"GROUP": self._heads // self._kv_heads, "BLOCK_SIZE": block_size}
        strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])
        self._numbers = (scale * LOG2_E, self._window, *strides, meta.block_tables.stride(0))

    def decode(self, out: Tensor, tile: Tile, split: int) -> None:
        """The first num_decode rows, an entry each."""
        count, states = self._meta.num_decode, self._parts(out, split)
        if states is None:
            grid: tuple[int, ...] = (count, self._kv_heads)
            self._attend(grid, out, None, 0, count, tile, SINGLE=True, TOKENS=1, SPLIT=0)
            return
        grid = (count, self._kv_heads, states[0].shape[2])
        self._attend(grid, states[0], states[1:], 0, count, tile, SINGLE=True, TOKENS=1, SPLIT=split)
        self._join(out, states, split)

    def prefill(self, out: Tensor, tile: Tile, split: int) -> None:
        """All other rows."""
        first, tokens = self._meta.num_decode, tile.rows // self._layout["GROUP"]
        grid = (self._num_tiles(out, tokens), self._kv_heads)
        count = len(self._meta.kv_lens) - first
        self._attend(grid, out, None, first, count, tile, SINGLE=False, TOKENS=tokens, SPLIT=split)

    def both(self, out: Tensor, choice: TileChoice, later_split: int) -> None:
        """All rows: what `decode` and `prefill` do, in one launch."""
        meta, states = self._meta, self._parts(out, choice.split_tokens)
        tokens = choice.prefill.rows // self._layout["GROUP"]
        num_tiles, num_parts = self._num_tiles(out, tokens), 1 if states is None else states[0].shape[2]
        attend_both_kernel[((meta.num_decode * num_parts + num_tiles) * self._kv_heads,)](
            *self._tensors,
            out,
            *((out, out, out) if states is None else states),
            *self._places,
            meta.num_decode,
            len(meta.kv_lens) - meta.num_decode,
            self._heads,
            self._kv_heads,
            num_parts,
            num_tiles,
            *self._numbers,
            **self._dim,
            **self._layout,
            TOKENS=tokens,
            M=choice.prefill.rows,
            N=choice.prefill.keys,
            SPLIT=later_split,
            DECODE_M=choice.decode.rows,
            DECODE_N=choice.decode.keys,
            DECODE_SPLIT=0 if states is None else choice.split_tokens,
            PARTS=states is not None,
            num_warps=choice.prefill.num_warps,
            num_stages=choice.prefill.num_stages,
            **OPTIONS,
        )
        if states is not None:
            self._join(out, states, choice.split_tokens)

    def _num_tiles(self, out: Tensor, tokens: int) -> int:
        """Room for tiles of `tokens` rows of the entries after the decode rows."""
        first = self._meta.num_decode
        return (out.shape[0] - first) // tokens + len(self._meta.kv_lens) - first

    def _parts(self, out: Tensor, split: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Sums, peaks and totals of every part of the decode rows; None where they have one each."""
        count, num_parts = self._meta.num_decode, -(-self._meta.max_kv_len // split)
        if num_parts <= 1:
            return None
        parts = out.new_empty((count, self._heads, num_parts, out.shape[2]), dtype=torch.float32)
        peaks, totals = parts.new_empty((2, count, self._heads, num_parts))
        return parts, peaks, totals

    def _join(self, out: Tensor, states: tuple[Tensor, Tensor, Tensor], split: int) -> None:
        meta = self._meta
        join_kernel[(meta.num_decode, self._heads)](
            *states,
            out,
            meta.kv_lens,
            meta.positions,
            self._heads,
            states[0].shape[2],
            self._window,
            **self._dim,
            SPLIT=split,
            num_warps=1,
            **OPTIONS,
        )

    def _attend(
        self,
        grid: tuple[int, ...],
        out: Tensor,
        states: tuple[Tensor, ...] | None,
        first: int,
        count: int,
        tile: Tile,
        **mode: Any,
    ) -> None:
        attend_kernel[grid](
            *self._tensors,
            out,
            *((out, out) if states is None else states),
            *self._places,
            first,
            count,
            self._heads,
            grid[-1],
            *self._numbers,
            **self._dim,
            **self._layout,
            **mode,
            M=tile.rows,
            N=tile.keys,
            PARTS=states is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )
