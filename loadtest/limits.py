"""What this machine can do at best in a decode step of the benchmark: matmuls alone, KV reads alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ellm.loadtest.bench_checkpoint import SHAPE


def machine_limits(
    dtype: str, batch: int, context: int, threads: int, shape: Mapping[str, int] = SHAPE
) -> dict[str, float]:
    """Seconds of a decode step's linear layers alone, and of reading its KV cache once at copy speed.

    The linear layers are timed by every routine that there is, torch's own (`plain_s`), oneDNN on packed
    weights (`packed_s`) and the engine's (`ours_s`), and the fastest is the limit (`linear_s`): a slow
    routine must not make a slow step look like the machine's best. Every layer's weights lie apart, so that
    the caches see what they see in service. Each is the best of several runs.
    """
    import torch

    from ellm.kernels.dispatch import select
    from ellm.kernels.packed_linear import PackedLinear, PlainLinear

    torch.set_num_threads(threads)
    element = getattr(torch, dtype)
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head
    shapes = [(hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)] * shape[
        "num_hidden_layers"
    ]
    shapes.append((hidden, vocab))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out, into, generator=generator).to(element) for into, out in shapes]
    inputs = {n: torch.randn(batch, n, generator=generator).to(element) for n in (hidden, ffn)}

    def through(pack: Callable[..., Callable[..., object]]) -> Callable[[], None]:
        layers = [(pack(weight, None), inputs[weight.shape[1]]) for weight in weights]

        def run() -> None:
            for layer, x in layers:
                layer(x)

        return run

    routines = {"plain_s": through(PlainLinear), "ours_s": through(select("cpu").linear)}
    if torch._C._has_mkldnn:
        routines["packed_s"] = through(PackedLinear)
    kv_bytes = batch * context * 2 * kv * shape["num_hidden_layers"] * inputs[hidden].element_size()
    source = torch.ones(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    with torch.inference_mode():
        times = best({**routines, "copy_s": lambda: target.copy_(source)})
    copied = 2 * source.numel()  # a copy reads and writes
    linears = {name: times[name] for name in routines}
    return {
        **linears,
        "linear_s": min(linears.values()),
        "kv_read_s": kv_bytes * times["copy_s"] / copied,
        "copy_bytes_s": copied / times["copy_s"],
    }


def best(calls: dict[str, Callable[[], object]], runs: int = 15) -> dict[str, float]:
    """Least seconds of several runs of each, after two to warm up; in turn, so that all meet one noise."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: min(taken[2:]) for name, taken in times.items()}
