"""Tiles of the Triton attention: which there are for a shape and which is taken, and the launches.

The lists are short and fixed: what is chosen depends on the layer's shape and type alone, so no kernel is
tuned, and no result changes, while requests are served. Sizes fit the registers and the shared memory of
sm_90 (227 KiB per block), as `ellm kernels check --aot sm_90` prints them; which is fastest has not been
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_attention import attend_kernel, join_kernel
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
    afresh. `same_sums`: others do so too, and decode rows have the bits that they would have in a chunk."""

    decode: Tile
    prefill: Tile
    same_sums: bool = False
    split_tokens: int = SPLIT_TOKENS

    @property
    def name(self) -> str:
        return f"{self.decode.name}+{self.prefill.name}{'=' if self.same_sums else ''}"


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
    if meta.num_decode:
        layer.decode(out, chosen.decode, chosen.split_tokens)
    if meta.num_decode < num_rows:
        layer.prefill(out, chosen.prefill, chosen.split_tokens if chosen.same_sums else 0)
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
        self._scale = scale * LOG2_E
        self._window = window or 0
        _, self._heads, dim = q.shape
        self._kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
        self._dim: dict[str, Any] = {
            "DIM": dim,
            "PADDED": max(16, triton.next_power_of_2(dim)),
            "HAS_WINDOW": window is not None,
        }
        self._layout: dict[str, Any] = {"GROUP": self._heads // self._kv_heads, "BLOCK_SIZE": block_size}
        self._strides = (*q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3])

    def decode(self, out: Tensor, tile: Tile, split: int) -> None:
        """The first num_decode rows, an entry each."""
        meta = self._meta
        count, num_parts = meta.num_decode, -(-meta.max_kv_len // split)
        if num_parts == 1:
            grid: tuple[int, ...] = (count, self._kv_heads)
            self._attend(grid, out, None, 0, count, tile, SINGLE=True, TOKENS=1, SPLIT=0)
            return
        parts = out.new_empty((count, self._heads, num_parts, out.shape[2]), dtype=torch.float32)
        states = parts.new_empty((2, count, self._heads, num_parts))
        grid = (count, self._kv_heads, num_parts)
        self._attend(grid, parts, states, 0, count, tile, SINGLE=True, TOKENS=1, SPLIT=split)
        join_kernel[(count, self._heads)](
            parts,
            *states,
            out,
            meta.kv_lens,
            meta.positions,
            self._heads,
            num_parts,
            self._window,
            **self._dim,
            SPLIT=split,
            num_warps=1,
            **OPTIONS,
        )

    def prefill(self, out: Tensor, tile: Tile, split: int) -> None:
        """All other rows."""
        first = self._meta.num_decode
        count = len(self._meta.kv_lens) - first
        tokens = tile.rows // self._layout["GROUP"]
        grid = ((out.shape[0] - first) // tokens + count, self._kv_heads)
        self._attend(grid, out, None, first, count, tile, SINGLE=False, TOKENS=tokens, SPLIT=split)

    def _attend(
        self,
        grid: tuple[int, ...],
        out: Tensor,
        states: Tensor | None,
        first: int,
        count: int,
        tile: Tile,
        **mode: Any,
    ) -> None:
        meta = self._meta
        attend_kernel[grid](
            *self._tensors,
            out,
            *((out, out) if states is None else states),
            meta.cu_seqlens_q,
            meta.kv_lens,
            meta.block_tables,
            meta.positions,
            first,
            count,
            self._heads,
            grid[-1],
            self._scale,
            self._window,
            *self._strides,
            meta.block_tables.stride(0),
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
