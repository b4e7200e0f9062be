"""Kernels of a step beside what they take the place of, on a GPU: milliseconds. One JSON file.

    python -m ellm.loadtest.gpu.kernels --out kernels.json

STRICT's linear beside the library's, with the share of the copy's rate at which weights are read; norm,
rotation and store in one launch beside three; sampling and log-probabilities beside torch's. Pairs are
compared before they are timed. Without a GPU the same runs interpreted on small sizes:

    TRITON_INTERPRET=1 python -m ellm.loadtest.gpu.kernels --device cpu --dtype float32 --linear 64x48 \\
        --rows 1 5 --heads 4 2 --dim 32 --vocab 300 --copy-mib 1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ellm.kernels.ops import AttentionMeta, HeadTransform, Ops, SamplingBatch
from ellm.kernels.reference import TorchOps
from ellm.kernels.triton_ops import TritonOps
from ellm.loadtest.gpu.timing import copy_rate, seconds, write

Row = dict[str, Any]


class Bench:
    """Two bodies on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.ours, self.torch = TritonOps(args.device), TorchOps()
        self.strict = TritonOps(args.device, deterministic=True)
        torch.manual_seed(0)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def pair(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Row:
        """Milliseconds of both, and how many times ours is as quick."""
        a, b = seconds(ours, self.device), seconds(theirs, self.device)
        return {"ours_ms": 1e3 * a, "theirs_ms": 1e3 * b, "theirs_over_ours": b / a}

    def linears(self, rate: float) -> list[Row]:
        found = []
        for word in self.args.linear:
            num_in, num_out = map(int, word.split("x"))
            weight = self.draw(num_out, num_in) / num_in**0.5
            strict, library = self.strict.linear(weight, None), self.torch.linear(weight, None)
            for rows in self.args.rows:
                x = self.draw(rows, num_in)
                torch.testing.assert_close(strict(x), library(x), rtol=2e-2, atol=2e-2)
                if self.device.type == "cuda":  # the interpreter's products are numpy's
                    assert torch.equal(strict(x)[-1:], strict(x[-1:])), "a row has other bits alone"
                row = {"linear": word, "rows": rows, **self.pair(partial(strict, x), partial(library, x))}
                row["share_of_copy"] = weight.nbytes / (row["ours_ms"] / 1e3) / rate
                found.append(row)
                print(row, flush=True)
        return found

    def heads(self) -> list[Row]:
        (heads, kv_heads), dim, found = self.args.heads, self.args.dim, []
        norm = self.draw(dim)
        transform = HeadTransform(norm, norm, 1e-5, self.draw(4096, 2, dim // 2, dtype=torch.float32))
        for rows in self.args.rows:
            qkv = self.draw(rows, heads + 2 * kv_heads, dim)
            pool = torch.zeros(2, rows // 16 + 1, kv_heads, 16, dim, device=self.device, dtype=self.dtype)
            at = torch.arange(rows, device=self.device)
            empty = at[:0].int()
            meta = AttentionMeta(empty, empty, empty, at, at, rows, 1, empty)

            def run(ops: Ops, qkv: Tensor = qkv, pool: Tensor = pool, meta: AttentionMeta = meta) -> Tensor:
                q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1)
                return ops.rotary_store(q, k, v, meta, (pool[0], pool[1]), transform)

            row = {"rotary_store": rows, **self.pair(partial(run, self.ours), partial(run, self.torch))}
            found.append(row)
            print(row, flush=True)
        return found

    def tokens(self) -> list[Row]:
        found = []
        for rows in self.args.rows:
            logits = self.draw(rows, self.args.vocab).mul_(3)
            for kind, settings in self._settings(rows).items():
                ours, theirs = self.ours.sample(logits, settings), self.torch.sample(logits, settings)
                assert torch.equal(ours, theirs), (kind, rows)
                timed = self.pair(
                    partial(self.ours.sample, logits, settings), partial(self.torch.sample, logits, settings)
                )
                found.append({"sample": kind, "rows": rows, **timed})
                print(found[-1], flush=True)
            ids = logits.argmax(-1)
            timed = self.pair(
                partial(self.ours.logprobs, logits, ids, 5), partial(self.torch.logprobs, logits, ids, 5)
            )
            found.append({"logprobs": 5, "rows": rows, **timed})
            print(found[-1], flush=True)
        return found

    def _settings(self, rows: int) -> dict[str, SamplingBatch]:
        at = torch.arange(rows, device=self.device)
        ones = torch.ones(rows, device=self.device)
        off = (None, None, None)
        return {
            "greedy": SamplingBatch(None, *off, None, None, None),
            "drawn": SamplingBatch(ones, *off, at, at, at),
            "top-k": SamplingBatch(ones, at * 0 + 50, None, None, at, at, at),
            "top-p": SamplingBatch(ones, None, 0.9 * ones, None, at, at, at),
            "all": SamplingBatch(ones, at * 0 + 50, 0.9 * ones, 0.01 * ones, at, at, at),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    add("--linear", nargs="*", default=["4096x6144", "4096x28672", "14336x4096"], metavar="INxOUT")
    add("--heads", type=int, nargs=2, default=[32, 8], metavar=("H", "K"))
    add("--dim", type=int, default=128)
    add("--vocab", type=int, default=128256)
    add("--copy-mib", type=int, default=1024)
    add("--out", default="kernels.json")
    args = parser.parse_args()
    bench = Bench(args)
    rate = copy_rate(bench.device, args.copy_mib)
    rows = [*bench.linears(rate), *bench.heads(), *bench.tokens()]
    write(args.out, bench.device, vars(args), copy_bytes_per_s=rate, rows=rows)


if __name__ == "__main__":
    main()
