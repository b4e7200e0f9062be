"""Attention of decode rows and of rows that are computed again: in one launch, in two, on two streams.

    python -m ellm.loadtest.gpu.fusion --out fusion.json

One layer. `batch` sequences of `context` tokens have a decode row each; the first `holes` of them have `hole`
tokens computed again. Checks that the three give the same result, bit by bit with the tiles of STRICT, and
says in milliseconds what each takes. Without a GPU the same runs interpreted, on sizes given by hand:

    TRITON_INTERPRET=1 python -m ellm.loadtest.gpu.fusion --device cpu --dtype float32 --heads 4 2 --dim 32 \\
        --case 3x60x1x32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_tiles import TileChoice, paged_attention, tile_choices
from ellm.loadtest.gpu.timing import seconds, write

BLOCK_SIZE = 16


class Case:
    """A pool whose blocks are dealt at random, and one step over it."""

    def __init__(self, args: argparse.Namespace, case: str) -> None:
        self.batch, self.context, self.holes, self.hole = map(int, case.split("x"))
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        heads, kv_heads = args.heads
        torch.manual_seed(0)
        per_sequence = -(-self.context // BLOCK_SIZE)
        shape = (2, self.batch * per_sequence, kv_heads, BLOCK_SIZE, args.dim)
        self.pools = torch.randn(shape, device=self.device, dtype=self.dtype)
        tables = torch.randperm(shape[1]).view(self.batch, per_sequence).int()
        rows = self.batch + self.holes * self.hole
        self.q = torch.randn(rows, heads, args.dim, device=self.device, dtype=self.dtype)
        self.scale = args.dim**-0.5
        self.whole = self._meta(tables, decode=True, holes=True)
        self.decode = self._meta(tables, decode=True, holes=False)
        self.again = self._meta(tables, decode=False, holes=True)

    def _meta(self, tables: Tensor, *, decode: bool, holes: bool) -> AttentionMeta:
        entries = [(i, self.context - 1, self.context) for i in range(self.batch)] if decode else []
        entries += [(i, 0, self.hole) for i in range(self.holes)] if holes else []
        counts = torch.tensor([end - start for _, start, end in entries])
        row_entry = torch.arange(len(entries)).repeat_interleave(counts)
        starts = torch.tensor([start for _, start, _ in entries])
        first = counts.cumsum(0) - counts
        positions = torch.arange(len(row_entry)) - first[row_entry] + starts[row_entry]

        def to(values: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
            return values.to(self.device, dtype)

        return AttentionMeta(
            cu_seqlens_q=to(torch.cat((first, counts.sum().view(1)))),
            kv_lens=to(torch.tensor([end for _, _, end in entries])),
            block_tables=to(tables[[i for i, _, _ in entries]]),
            positions=to(positions, torch.int64),
            slot_mapping=to(positions, torch.int64),  # attention does not read it
            num_decode=self.batch if decode else 0,
            max_kv_len=max(end for _, _, end in entries),
            row_entry=to(row_entry),
            num_recompute=self.holes if holes else 0,
        )

    def attend(self, q: Tensor, meta: AttentionMeta, choice: TileChoice) -> Tensor:
        return paged_attention(q, self.pools[0], self.pools[1], meta, self.scale, None, choice)

    def ways(self, choice: TileChoice) -> dict[str, Callable[[], Tensor]]:
        """name -> the attention of all rows."""
        ways = {
            "serial": lambda: self.attend(self.q, self.whole, choice),
            "fused": lambda: self.attend(self.q, self.whole, replace(choice, fused=True)),
        }
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

            def two_streams() -> Tensor:
                main = torch.cuda.current_stream(self.device)
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    later = self.attend(self.q[self.batch :], self.again, choice)
                first = self.attend(self.q[: self.batch], self.decode, choice)
                main.wait_stream(side)
                later.record_stream(main)
                return torch.cat((first, later))

            ways["two streams"] = two_streams
        return ways


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for word in args.case:
        case = Case(args, word)
        for choice in tile_choices(case.dtype, args.dim, args.heads[0] // args.heads[1]):
            row: dict[str, Any] = {"case": word, "tiles": choice.name}
            expected = None
            for name, call in case.ways(choice).items():
                got = call()
                expected = got if expected is None else expected
                error = float((got - expected).abs().max())
                assert error == 0.0 if choice.same_sums else error < 2e-2, (word, choice.name, name, error)
                row |= {f"{name}_ms": 1e3 * seconds(call, case.device), f"{name}_difference": error}
            row["serial_over_fused"] = row["serial_ms"] / row["fused_ms"]
            found.append(row)
            print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--heads", type=int, nargs=2, default=[32, 8], metavar=("H", "K"))
    add("--dim", type=int, default=128)
    add(
        "--case",
        nargs="*",
        default=["32x4096x4x512", "32x4096x16x512", "128x2048x32x256", "8x16384x8x2048"],
        metavar="BATCHxCONTEXTxHOLESxHOLE",
    )
    add("--out", default="fusion.json")
    args = parser.parse_args()
    write(args.out, torch.device(args.device), vars(args), rows=measure(args))


if __name__ == "__main__":
    main()
