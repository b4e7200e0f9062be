"""What this machine can do at best in a decode step of the benchmark: matmuls alone, KV reads alone."""

from __future__ import annotations

import time

from ellm.loadtest.bench_checkpoint import SHAPE


def machine_limits(dtype: str, batch: int, context: int, threads: int) -> dict[str, float]:
    """Seconds of a decode step's linear layers alone, and of reading its KV cache once at copy speed.

    The linear layers run on packed weights as the engine's do, every layer's weights apart (so that the
    caches see what they see in service); best of several runs.
    """
    import torch

    from ellm.kernels.dispatch import select

    torch.set_num_threads(threads)
    element = getattr(torch, dtype)
    ops = select("cpu")
    hidden, ffn, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    head = hidden // SHAPE["num_attention_heads"]
    kv = SHAPE["num_key_value_heads"] * head
    shapes = [(hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)] * SHAPE[
        "num_hidden_layers"
    ]
    shapes.append((hidden, vocab))
    generator = torch.Generator().manual_seed(0)
    layers = [
        ops.linear(torch.randn(out, into, generator=generator).to(element), None) for into, out in shapes
    ]
    inputs = {n: torch.randn(batch, n, generator=generator).to(element) for n in (hidden, ffn)}

    def linears() -> None:
        for layer, (into, _) in zip(layers, shapes, strict=True):
            layer(inputs[into])

    kv_bytes = batch * context * 2 * kv * SHAPE["num_hidden_layers"] * inputs[hidden].element_size()
    source = torch.ones(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    with torch.inference_mode():
        linear_s = best(linears)
        copy_s = best(lambda: target.copy_(source))
    copied = 2 * source.numel()  # a copy reads and writes
    return {"linear_s": linear_s, "kv_read_s": kv_bytes * copy_s / copied, "copy_bytes_s": copied / copy_s}


def best(call: object, runs: int = 15) -> float:
    """Least seconds of several calls, after two that warm up."""
    assert callable(call)
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[2:])
