"""Paged attention by every tile of its shape on a GPU: decode beside the rate of a plain copy, prefill beside
torch's FlashAttention, both beside FlashInfer where it is installed. One JSON file.

    python -m ellm.loadtest.gpu.attention --out attention.json

Aims, of the tiles that are taken in service: 85 % of the copy's rate where a layer's KV is 256 MiB or more,
0.9 of FlashAttention's speed.

Without a GPU the same runs interpreted on sizes given by hand, which shows that it works and nothing else:

    TRITON_INTERPRET=1 python -m ellm.loadtest.gpu.attention --device cpu --dtype float32 --heads 4 2 \\
        --dim 32 --decode 2x40 --prefill 50 --copy-mib 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta
from ellm.kernels.triton_tiles import TileChoice, paged_attention, tile_choices
from ellm.loadtest.gpu.attention_peers import (
    Call,
    chosen_attention,
    flash_attention,
    flashinfer_decode,
    flashinfer_prefill,
)
from ellm.loadtest.gpu.timing import aim, beside, copy_rate, seconds, unmeasured, write

BLOCK_SIZE = 16
LARGE_MIB = 256  # of KV: from here on decode shall read it at nearly a copy's rate


class Layer:
    """A pool whose blocks are dealt at random, and steps over it."""

    def __init__(self, args: argparse.Namespace, sequences: int, tokens: int) -> None:
        self.heads, self.kv_heads = args.heads
        self._shape = (self.heads, args.dim)
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self._sequences, self._tokens = sequences, tokens
        per_sequence = -(-tokens // BLOCK_SIZE)
        torch.manual_seed(0)
        shape = (2, sequences * per_sequence, self.kv_heads, BLOCK_SIZE, args.dim)
        self.pools = torch.randn(shape, device=self.device, dtype=self.dtype)
        self.tables = torch.randperm(shape[1]).view(sequences, per_sequence).int().to(self.device)
        self.kv_bytes = 2 * sequences * tokens * self.kv_heads * args.dim * self.dtype.itemsize

    def queries(self, rows: int) -> Tensor:
        """[sequences * rows, H, D]"""
        return torch.randn(self._sequences * rows, *self._shape, device=self.device, dtype=self.dtype)

    def step(self, rows: int, q: Tensor) -> Callable[[TileChoice], Tensor]:
        """Attention of the last `rows` rows of every sequence."""
        count = self._sequences

        def to(values: Tensor, dtype: torch.dtype) -> Tensor:
            return values.to(self.device, dtype)

        entry = torch.arange(count).repeat_interleave(rows)
        positions = torch.arange(self._tokens - rows, self._tokens).repeat(count)
        meta = AttentionMeta(
            cu_seqlens_q=to(rows * torch.arange(count + 1), torch.int32),
            kv_lens=to(torch.full((count,), self._tokens), torch.int32),
            block_tables=self.tables,
            positions=to(positions, torch.int64),
            slot_mapping=to(positions, torch.int64),  # attention does not read it
            num_decode=count if rows == 1 else 0,
            max_kv_len=self._tokens,
            row_entry=to(entry, torch.int32),
        )
        keys, values = self.pools
        scale = self._shape[1] ** -0.5
        return lambda choice: paged_attention(q, keys, values, meta, scale, None, choice)


def tiles(args: argparse.Namespace) -> tuple[TileChoice, ...]:
    return tile_choices(getattr(torch, args.dtype), args.dim, args.heads[0] // args.heads[1])


def peer(found: dict[str, float | str], name: str, make: Callable[[], Call], device: torch.device) -> None:
    """Milliseconds of another's attention, or why there are none: it may be absent, or refuse the shape."""
    try:
        found[f"{name}_ms"] = 1e3 * seconds(make(), device)
    except Exception as error:  # whatever a peer raises is its own
        found[f"{name}_absent"] = (str(error).strip() or type(error).__name__).splitlines()[0]


def decode(args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Every batch by every tile: bytes of KV per second, and as a share of the copy's."""
    found = []
    for word in args.decode:
        sequences, tokens = map(int, word.split("x"))
        layer = Layer(args, sequences, tokens)
        q = layer.queries(1)
        step, others = layer.step(1, q), dict[str, float | str]()
        make = partial(flashinfer_decode, q, layer.pools, layer.tables, tokens)
        peer(others, "flashinfer", make, layer.device)
        for index, choice in enumerate(tiles(args)):
            time = seconds(partial(step, choice), layer.device)
            row = {"batch": sequences, "context": tokens, "tiles": choice.name, "served": index == 0}
            row |= {"ms": 1e3 * time, "kv_mib": layer.kv_bytes / 2**20}
            row |= {"share_of_copy": layer.kv_bytes / time / rate, **others}
            found.append(row)
            print(row, flush=True)
    return found


def prefill(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One prompt by every tile: TFLOP/s, and beside others' attention on contiguous keys."""
    found = []
    for tokens in args.prefill:
        layer = Layer(args, 1, tokens)
        step = layer.step(tokens, layer.queries(tokens))
        flops = 2.0 * tokens * tokens * args.dim * layer.heads  # half of the square is masked
        shapes = ((layer.heads, tokens), (layer.kv_heads, tokens), (layer.kv_heads, tokens))
        inputs = [
            torch.randn(1, *shape, args.dim, device=layer.device, dtype=layer.dtype) for shape in shapes
        ]
        others: dict[str, float | str] = {}
        for name, make in (
            ("flash", flash_attention),
            ("torch", chosen_attention),
            ("flashinfer", flashinfer_prefill),
        ):
            peer(others, name, partial(make, *inputs), layer.device)
        for index, choice in enumerate(tiles(args)):
            time = seconds(partial(step, choice), layer.device)
            row = {"tokens": tokens, "tiles": choice.name, "served": index == 0, "ms": 1e3 * time}
            row |= {"tflops": flops / time / 1e12, **others}
            for name, their_ms in others.items():
                if isinstance(their_ms, float):
                    row[f"{name.removesuffix('_ms')}_over_ours"] = their_ms / (1e3 * time)
            found.append(row)
            print(row, flush=True)
    return found


def aims(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the tiles that are served; what a peer has not said is said to be missing."""
    made = []
    decode = [row for row in found["decode"] if row["served"]]
    for row in decode:
        what = f"decode {row['batch']}x{row['context']}"
        if row["kv_mib"] >= LARGE_MIB:
            made.append(aim(f"{what}: share of the copy's rate", row["share_of_copy"], 0.85))
        if "flashinfer_ms" in row:
            made.append(beside(f"{what}: FlashInfer's time over ours", row["flashinfer_ms"] / row["ms"]))
        else:
            made.append(unmeasured(f"{what}: beside FlashInfer", row.get("flashinfer_absent", "not run")))
    if all(row["kv_mib"] < LARGE_MIB for row in decode):
        what = f"decode with KV of {LARGE_MIB} MiB a layer: share of the copy's rate"
        made.append(unmeasured(what, "no such shape was run"))
    prefill = [row for row in found["prefill"] if row["served"]]
    for row in prefill:
        what = f"prefill {row['tokens']}"
        if "flash_over_ours" in row:
            made.append(aim(f"{what}: of FlashAttention", row["flash_over_ours"], 0.9))
        else:
            made.append(unmeasured(f"{what}: of FlashAttention", row.get("flash_absent", "not run")))
        if "flashinfer_over_ours" in row:
            made.append(beside(f"{what}: FlashInfer's time over ours", row["flashinfer_over_ours"]))
        else:
            made.append(unmeasured(f"{what}: beside FlashInfer", row.get("flashinfer_absent", "not run")))
    if not prefill:
        made.append(unmeasured("prefill: of FlashAttention", "no prompt was run"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--heads", type=int, nargs=2, default=[32, 8], metavar=("H", "K"))
    add("--dim", type=int, default=128)
    add("--decode", nargs="*", default=["1x65536", "8x16384", "32x4096", "128x2048"], metavar="BATCHxCONTEXT")
    add("--prefill", type=int, nargs="*", default=[1024, 4096, 16384], metavar="TOKENS")
    add("--copy-mib", type=int, default=1024)
    add("--out", default="attention.json")
    args = parser.parse_args()
    rate = copy_rate(torch.device(args.device), args.copy_mib)
    found = {"decode": decode(args, rate), "prefill": prefill(args)}
    device = torch.device(args.device)
    write(args.out, device, vars(args), copy_bytes_per_s=rate, aims=aims(found), **found)


if __name__ == "__main__":
    main()
