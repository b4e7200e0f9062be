"""Batches over a paged pool for tests: sequences with fixed queries, keys and values, cut into any steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer."""

    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


class PagedSequences:
    """Sequences whose keys and values lie in one pool, each under a random table of blocks."""

    def __init__(self, lengths: list[int], heads: Heads, seed: int = 0, poison: float = 0.0) -> None:
        """`poison` fills every slot that holds no token."""
        self.heads = heads
        self.lengths = lengths
        generator = torch.Generator().manual_seed(seed)
        shape = (heads.num_kv_heads, heads.dim)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(heads.dtype)

        self.q = [draw(n, heads.num_heads, heads.dim) for n in lengths]
        self.k = [draw(n, *shape) for n in lengths]
        self.v = [draw(n, *shape) for n in lengths]
        counts = [-(-n // heads.block_size) for n in lengths]
        self.pool_shape = (sum(counts) + 3, heads.num_kv_heads, heads.block_size, heads.dim)
        self.place(seed + 1, poison)

    def place(self, seed: int, poison: float = 0.0) -> None:
        """Lay the sequences out anew, in other blocks."""
        block_size = self.heads.block_size
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.pool_shape[0], generator=generator).tolist()
        self.k_pool = torch.full(self.pool_shape, poison, dtype=self.heads.dtype)
        self.v_pool = torch.full(self.pool_shape, poison, dtype=self.heads.dtype)
        self.tables: list[list[int]] = []
        for k, v in zip(self.k, self.v, strict=True):
            table = [order.pop() for _ in range(-(-len(k) // block_size))]
            self.tables.append(table)
            for position in range(len(k)):
                block, offset = table[position // block_size], position % block_size
                self.k_pool[block, :, offset] = k[position]
                self.v_pool[block, :, offset] = v[position]

    def step(self, entries: list[tuple[int, int, int]]) -> tuple[Tensor, AttentionMeta]:
        """Queries and meta of a step of entries (sequence, start, end): single rows first, as in a plan."""
        single = [e for e in entries if e[2] - e[1] == 1]
        assert entries[: len(single)] == single
        block_size = self.heads.block_size
        width = max((len(self.tables[i]) for i, _, _ in entries), default=0) + 1
        tables = torch.zeros(len(entries), width, dtype=torch.int32)
        for row, (i, _, _) in enumerate(entries):
            tables[row, : len(self.tables[i])] = torch.tensor(self.tables[i])
        spans = [torch.arange(start, end) for _, start, end in entries]
        positions = torch.cat([*spans, torch.zeros(0, dtype=torch.int64)])
        row_entry = torch.repeat_interleave(
            torch.arange(len(entries)), torch.tensor([len(s) for s in spans]).long()
        )
        slots = tables[row_entry, positions // block_size].long() * block_size + positions % block_size
        ends = [end for _, _, end in entries]
        meta = AttentionMeta(
            cu_seqlens_q=torch.tensor([0, *(len(s) for s in spans)]).cumsum(0).int(),
            kv_lens=torch.tensor(ends, dtype=torch.int32),
            block_tables=tables,
            positions=positions,
            slot_mapping=slots,
            num_decode=len(single),
            max_kv_len=max(ends, default=0),
            row_entry=row_entry.int(),
        )
        rows = [self.q[i][start:end] for i, start, end in entries]
        return torch.cat([*rows, self.q[0][:0]]), meta

    def dense(self, i: int, window: int | None = None) -> Tensor:
        """What attention of sequence i is by definition, in float64: [length, heads, dim]."""
        group = self.heads.num_heads // self.heads.num_kv_heads
        q = self.q[i].double().transpose(0, 1)
        k, v = (x[i].double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (self.k, self.v))
        scores = q @ k.transpose(1, 2) * self.heads.dim**-0.5
        distance = torch.arange(len(self.q[i]))[:, None] - torch.arange(len(self.q[i]))
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN equals itself, and 0 is not -0."""
    kind = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
