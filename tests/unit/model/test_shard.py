"""Of each tensor all ranks together hold every part once, and a rank reads its own alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import write_checkpoint
from support.golden import RANK_CASES

from ellm.worker.api.config import CacheConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.executor.pool_size import MemoryBudget, share_of_rank, size_pool
from ellm.worker.model.architecture import Architecture, parse_architecture
from ellm.worker.model.inspect import check_weights, read_architecture
from ellm.worker.model.loader import WeightReader
from ellm.worker.model.safetensors_files import TensorEntry
from ellm.worker.model.shard import ABSENT, Part, Shard, architecture_of_rank, check_sharding, part_of

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 102,
    "max_position_embeddings": 64,
}


def arch(**changes: Any) -> Architecture:
    return parse_architecture(LLAMA | changes)


def reader(folder: Path, rank: int, size: int) -> WeightReader:
    model = read_architecture(folder)
    cut = partial(part_of, arch=model, shard=Shard(rank, size))
    return WeightReader(check_weights(folder, model), torch.float32, CPU, part_of=cut)


@pytest.mark.parametrize(("case", "size"), [(case, size) for case in RANK_CASES for size in (2, 4)])
def test_parts_make_the_whole(tmp_path: Path, case: str, size: int) -> None:
    family, overrides = RANK_CASES[case]
    write_checkpoint(tmp_path, family, **overrides)
    model = read_architecture(tmp_path)
    names = list(check_weights(tmp_path, model))
    whole = reader(tmp_path, 0, 1)
    ranks = [reader(tmp_path, rank, size) for rank in range(size)]
    cut = set()
    for name in names:
        want, parts = whole.read(name), [r.optional(name) for r in ranks]
        part = part_of(name, model, Shard(0, size))
        layer = name.split(".")[-2]
        if part is None and any(p is None for p in parts):  # the bias of a sum: one rank's
            assert layer in ("o_proj", "out_proj", "down_proj", "fc2")
            assert name.endswith(".bias")
            assert torch.equal(next(p for p in parts if p is not None), want)
            assert sum(p is not None for p in parts) == 1
            continue
        held = [p for p in parts if p is not None]
        assert len(held) == size
        if part is None:
            assert all(torch.equal(p, want) for p in held)
            continue
        cut.add(layer)
        if layer in ("k_proj", "v_proj") and model.num_kv_heads < size:
            held = held[:: size // model.num_kv_heads]  # each head is held by several in a row
        joined = torch.cat(held, dim=part.dim)
        assert torch.equal(joined.narrow(part.dim, 0, want.shape[part.dim]), want), name
        assert not joined.narrow(
            part.dim, want.shape[part.dim], joined.shape[part.dim] - want.shape[part.dim]
        ).any()
    inner = {"fc1", "fc2"} if family == "opt" else {"gate_proj", "up_proj", "down_proj"}
    out = "out_proj" if family == "opt" else "o_proj"
    assert {"q_proj", "k_proj", "v_proj", "embed_tokens", out, *inner} <= cut


def test_a_rank_reads_its_own_part_alone(tmp_path: Path) -> None:
    """By the reader's count, and by the pages of the file that the process has touched."""
    rows, columns = 4096, 1024
    file = tmp_path / "model.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(rows, columns)}, file)
    entry = TensorEntry(file, "model.layers.0.mlp.up_proj.weight", (rows, columns), "F32")
    quarter = rows * columns // 4 * 4
    weights = WeightReader(
        {entry.name: entry},
        torch.float32,
        CPU,
        part_of=lambda name: Part(0, rows // 2, 3 * rows // 4, rows // 4),
    )
    assert weights.read(entry.name).shape == (rows // 4, columns)
    assert weights.num_read_bytes == quarter
    touched = mapped_bytes(file)
    assert quarter <= touched < 2 * quarter  # the system maps some pages around a touched one
    weights.close()


def mapped_bytes(file: Path) -> int:
    """Of a mapped file that are in this process's memory."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_bytes_and_progress_count_the_part(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_attention_heads=8, num_key_value_heads=4, head_dim=12)
    told: list[float] = []
    model = read_architecture(tmp_path)
    entries = check_weights(tmp_path, model)
    total = sum(entry.num_bytes for entry in entries.values())
    read = []
    for rank in range(4):
        cut = partial(part_of, arch=model, shard=Shard(rank, 4))
        weights = WeightReader(entries, torch.float32, CPU, lambda what, share: told.append(share), cut)
        for name in entries:
            weights.read(name)
        read.append(weights.num_read_bytes)
        assert told[-1] == 1.0
    norms = sum(entry.num_bytes for name, entry in entries.items() if "norm" in name)
    assert read == [(total - norms) // 4 + norms] * 4


def test_an_architecture_of_a_rank() -> None:
    own = architecture_of_rank(arch(), 4)
    assert (own.num_heads, own.num_kv_heads, own.intermediate_size, own.vocab_size) == (2, 1, 24, 102)
    assert own.head_dim == 8
    assert own.kv_elements_per_token == 2 * 1 * 1 * 8
    assert architecture_of_rank(arch(), 1) == arch()


@pytest.mark.parametrize("rank", range(8))
def test_a_rank_holds_the_key_heads_that_its_queries_look_at(rank: int) -> None:
    model = arch()
    part = part_of("model.layers.0.self_attn.k_proj.weight", model, Shard(rank, 8))
    assert part is not None
    assert part.start == (rank // 4) * model.head_dim  # four query heads share one
    assert part.length == model.head_dim


def test_biases_of_sums_are_one_ranks() -> None:
    name = "model.layers.3.mlp.down_proj.bias"
    assert part_of(name, arch(), Shard(0, 2)) is None
    assert part_of(name, arch(), Shard(1, 2)) == ABSENT
    assert part_of("model.layers.0.self_attn.q_proj.bias", arch(), Shard(1, 2)) == Part(0, 32, 64, 32)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "3 does not divide the model's 8 attention heads"),
        ({"num_attention_heads": 10, "hidden_size": 80, "intermediate_size": 96}, 5, "96 inner columns"),
        ({"num_key_value_heads": 4, "num_attention_heads": 24, "hidden_size": 192}, 6, "4 key/value heads"),
        ({"vocab_size": 5}, 4, "too large for a vocabulary of 5"),
    ],
)
def test_sizes_that_cannot_be_had(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_sharding(arch(**changes), size)
    assert caught.value.param == "tensor_parallel_size"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_sizes_that_can(size: int) -> None:
    check_sharding(arch(), size)


def test_ranks_share_what_a_worker_may_have() -> None:
    cache = share_of_rank(CacheConfig(max_pool_bytes=1000, host_bytes=500), 4)
    assert (cache.max_pool_bytes, cache.host_bytes) == (250, 125)
    assert share_of_rank(CacheConfig(), 4) == CacheConfig()
    budget = MemoryBudget(available=1 << 40, weights=0, activations=0, block=1 << 20, on_cpu=True)
    alone = size_pool(CacheConfig(), budget, 16, may_shorten=False)
    quarter = replace(budget, block=1 << 18, num_ranks=4)
    assert size_pool(CacheConfig(), quarter, 16, may_shorten=False).num_blocks == alone.num_blocks == 1024
