"""The host tier's memory on a GPU: bytes per second each way, both ways at once, and beside a computation.

    python -m ellm.loadtest.gpu.host_copies --out host_copies.json

Saves and loads blocks one by one and several at a time, beside the rate of one large copy; streams layers by
the copy engine and by a kernel that reads pinned memory. What comes back is compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ellm.kernels.triton_ops import TritonOps
from ellm.loadtest.gpu.timing import seconds, write
from ellm.worker.engine.plan import BlockCopy, StreamedBlock
from ellm.worker.executor.cuda_copies import CudaCopier
from ellm.worker.model.cuda_host_pool import CudaLayerLoads, PinnedHostPool
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.kv_cache import KVCache, block_bytes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000}
CONFIG |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8}


class Tier:
    """A pool of Llama-3-8B's shape, and its host memory."""

    def __init__(self, device: torch.device, blocks: int, *, by_kernel: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(CONFIG | LLAMA_8B))
            arch = read_architecture(Path(folder))
        self.blocks, self.device = blocks, device
        self.block_bytes = block_bytes(arch, 16, torch.bfloat16)
        self.cache = KVCache(arch, blocks, 16, torch.bfloat16, device, num_transient=blocks)
        self.cache.pool.normal_()
        self.host = PinnedHostPool(self.cache, blocks, TritonOps(str(device)), streams_by_kernel=by_kernel)
        self.copier = CudaCopier(self.host, self.block_bytes, device)
        self.loads = CudaLayerLoads(self.host, self.cache)
        self._next = 0

    def copies(self, blocks: list[int], hosts: list[int]) -> list[BlockCopy]:
        made = [BlockCopy(self._next + i, b, h) for i, (b, h) in enumerate(zip(blocks, hosts, strict=True))]
        self._next += len(made)
        return made

    def move(self, saves: list[BlockCopy], loads: list[BlockCopy]) -> float:
        """Bytes per second, of both directions together."""
        torch.cuda.synchronize(self.device)
        begin = perf_counter()
        self.copier.start(saves, loads)
        self.copier.wait_all()
        torch.cuda.synchronize(self.device)
        passed = perf_counter() - begin
        ended = self.copier.ended()
        assert not ended.failed
        assert len(ended.done) == len(saves) + len(loads)
        return (len(saves) + len(loads)) * self.block_bytes / passed

    def close(self) -> None:
        self.copier.close()
        self.loads.close()
        self.host.close()


def whole_blocks(tier: Tier) -> dict[str, float]:
    """Rates of saves, loads and both; the blocks that come back are those that went."""
    order = torch.randperm(tier.blocks).tolist()
    hosts = list(range(tier.blocks))
    before = tier.cache.resident.clone()
    found = {"save_one_by_one": 0.0, "save": 0.0, "load_one_by_one": 0.0, "load": 0.0}
    for name in found:
        saving, single = name.startswith("save"), name.endswith("one")
        if not saving:
            tier.cache.resident.zero_()
        rates = []
        for part in ([i] for i in range(tier.blocks)) if single else [hosts]:
            moved = tier.copies([order[i] for i in part], part)
            rates.append(tier.move(moved, []) if saving else tier.move([], moved))
        found[name] = len(rates) / sum(1 / rate for rate in rates)
        assert torch.equal(tier.cache.resident.view(torch.int16), before.view(torch.int16)), name
    half = tier.blocks // 2
    saves, loads = tier.copies(order[:half], hosts[:half]), tier.copies(order[half:], hosts[half:])
    found["both_ways"] = tier.move(saves, loads)
    return found


def streamed(tier: Tier, compute: Callable[[], Any], share: int) -> dict[str, float]:
    """Milliseconds of a step that computes in each layer, that streams `share` blocks, and that does both."""
    torch.cuda.synchronize(tier.device)
    tier.move(tier.copies(list(range(tier.blocks)), list(range(tier.blocks))), [])
    streams = [StreamedBlock(i, tier.cache.num_blocks + i) for i in range(share)]

    def step(computes: bool, streaming: bool) -> None:
        if streaming:
            tier.loads.begin(streams)
        for layer in range(tier.cache.num_layers):
            if streaming:
                tier.loads.ready(layer)
            if computes:
                compute()

    def check() -> None:
        tier.loads.begin(streams)
        for layer in range(tier.cache.num_layers):
            tier.loads.ready(layer)
            bank = tier.cache.bank(layer)[:, :share]
            assert torch.equal(bank.view(torch.int16), own(layer).view(torch.int16)), f"layer {layer}"

    def own(layer: int) -> Tensor:
        return tier.cache.resident[:, layer, :share]

    check()
    plain, alone, both = (
        1e3 * seconds(partial(step, c, s), tier.device)
        for c, s in ((True, False), (False, True), (True, True))
    )
    gigabytes = share * tier.block_bytes / 1e9
    return {
        "compute_ms": plain,
        "streams_ms": alone,
        "both_ms": both,
        "stream_gb_per_s": gigabytes / alone * 1e3,
        "hidden_share": (plain + alone - both) / min(plain, alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=512, help="of 2 MiB")
    parser.add_argument("--streamed", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--out", default="host_copies.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    source = torch.zeros(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    link = source.numel() / seconds(lambda: target.copy_(source, non_blocking=True), device)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    found: dict[str, Any] = {"link_bytes_per_s": link, "streams": []}
    for by_kernel in (False, True):
        tier = Tier(device, args.blocks, by_kernel=by_kernel)
        if not by_kernel:
            found["blocks_bytes_per_s"] = whole_blocks(tier)
            print(found, flush=True)
        for share in args.streamed:
            row = {"by": "kernel" if by_kernel else "copy engine", "blocks": share}
            found["streams"].append(row | streamed(tier, lambda: a @ a, share))
            print(found["streams"][-1], flush=True)
        tier.close()
    write(args.out, device, vars(args), **found)


if __name__ == "__main__":
    main()
