"""Paged causal attention in plain torch: rows in padded query tiles, keys in tiles of fixed size.

No loop over sequences. The rows of an entry are cut into tiles of up to QUERY_TILE rows (decode rows into
tiles of one), every tile walks the key tiles of its entry in position order, and a running maximum and sum
(online softmax, Milakov and Gimelshein 2018) joins them, so memory is bounded by the tiles, not the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta

QUERY_TILE = 32  # rows
KEY_TILE = 512  # tokens, rounded down to whole blocks


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """q [R, H, D] over k_cache, v_cache [N, K, B, D] -> [R, H, D] in q's dtype; sums in float32."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_decode = meta.num_decode
    if num_decode:
        rows = torch.arange(num_decode, device=q.device).unsqueeze(1)
        tiles = _Tiles(q, meta, rows, rows == rows)
        out[:num_decode] = tiles.attend(k_cache, v_cache, scale, sliding_window).squeeze(1).to(q.dtype)
    if num_decode < q.shape[0]:
        rows, valid = _query_tiles(meta)
        tiles = _Tiles(q, meta, rows, valid)
        result = tiles.attend(k_cache, v_cache, scale, sliding_window)
        out[rows[valid]] = result[valid].to(q.dtype)
    return out


def _query_tiles(meta: AttentionMeta) -> tuple[Tensor, Tensor]:
    """Rows [T, QUERY_TILE] of the entries after the decode rows, and which of them are real."""
    cu = meta.cu_seqlens_q[meta.num_decode :].long()
    lengths = cu[1:] - cu[:-1]
    tiles_of = (lengths + QUERY_TILE - 1) // QUERY_TILE
    entry = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), tiles_of)
    before = tiles_of.cumsum(0) - tiles_of
    first = (torch.arange(len(entry), device=cu.device) - before[entry]) * QUERY_TILE
    offset = first.unsqueeze(1) + torch.arange(QUERY_TILE, device=cu.device)
    valid = offset < lengths[entry].unsqueeze(1)
    rows = cu[:-1][entry].unsqueeze(1) + torch.where(valid, offset, 0)
    return rows, valid


class _Tiles:
    """T query tiles of up to M rows, each within one entry."""

    def __init__(self, q: Tensor, meta: AttentionMeta, rows: Tensor, valid: Tensor) -> None:
        self._entry = meta.row_entry[rows[:, 0]].long()  # [T]
        self._q = q[rows].float()  # [T, M, H, D]
        # A padding row sees what row 0 of its entry sees; its result is thrown away.
        self._positions = meta.positions[rows]  # [T, M]
        self._meta = meta

    def attend(self, k_cache: Tensor, v_cache: Tensor, scale: float, window: int | None) -> Tensor:
        """-> [T, M, H, D] float32."""
        num_tiles, num_rows, num_heads, dim = self._q.shape
        num_kv, block_size = k_cache.shape[1], k_cache.shape[2]
        group = num_heads // num_kv
        # [T, K, G * M, D]: the rows of a group's heads share their keys.
        q = (self._q * scale).view(num_tiles, num_rows, num_kv, group, dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(num_tiles, num_kv, group * num_rows, dim)
        peak = q.new_full((num_tiles, num_kv, group * num_rows, 1), float("-inf"))
        total = torch.zeros_like(peak)
        acc = torch.zeros_like(q)
        step = max(1, KEY_TILE // block_size)  # blocks
        for first in range(0, -(-self._meta.max_kv_len // block_size), step):
            blocks = self._meta.block_tables[self._entry, first : first + step].long()
            seen = self._seen(first * block_size, blocks.shape[1] * block_size, window)
            keys, values = _gather(k_cache, blocks), _gather(v_cache, blocks)
            scores = (q @ keys.transpose(-1, -2)).view(num_tiles, num_kv, group, num_rows, -1)
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
            scores = scores.view(num_tiles, num_kv, group * num_rows, -1)
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            base = new_peak.masked_fill(new_peak == float("-inf"), 0.0)  # nothing seen yet: exp(-inf) = 0
            weights = torch.exp(scores - base)
            decay = torch.exp(peak - base)
            total = total * decay + weights.sum(-1, keepdim=True)
            acc = acc * decay + weights @ values
            peak = new_peak
        acc = (acc / total).view(num_tiles, num_kv, group, num_rows, dim)
        return acc.permute(0, 3, 1, 2, 4).reshape(num_tiles, num_rows, num_heads, dim)

    def _seen(self, start: int, length: int, window: int | None) -> Tensor:
        """[T, M, length]: which keys at positions start, start + 1, ... each row sees."""
        keys = torch.arange(start, start + length, device=self._positions.device)
        rows = self._positions.unsqueeze(-1)
        seen = keys <= rows
        return seen if window is None else seen & (keys > rows - window)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """cache [N, K, B, D], blocks [T, n] -> [T, K, n * B, D] float32."""
    tiles = cache[blocks].transpose(1, 2)  # [T, K, n, B, D]
    return tiles.reshape(tiles.shape[0], tiles.shape[1], -1, tiles.shape[-1]).float()
