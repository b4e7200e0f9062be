"""How a model is cut for the ranks of a tensor-parallel group: the part of each tensor that a rank holds.

Column-parallel (rows of the weight): q, k, v by heads, gate, up and fc1 by inner columns, embedding and LM
head by vocabulary, the last rank's part padded with zeros. Row-parallel (columns of the weight): the
attention's output projection, down and fc2; their products are partial sums, to be added over the ranks, and
so their bias is rank 0's alone. The rest (norms, positions, OPT's projections of embeddings) every rank has
whole. Where there are more ranks than key/value heads, several ranks hold the same head. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.architecture import Architecture

_BY_HEADS = ("q_proj",)
_BY_KV_HEADS = ("k_proj", "v_proj")
_BY_INNER = ("gate_proj", "up_proj", "fc1")
_BY_VOCAB = ("embed_tokens", "lm_head")
_ADDED_HEADS = ("o_proj", "out_proj")
_ADDED_INNER = ("down_proj", "fc2")


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a group."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """Of one tensor: [start, stop) along `dim`, padded with zeros to `length` there."""

    dim: int
    start: int
    stop: int
    length: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part as it is held."""
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])


ABSENT = Part(0, 0, 0, 0)  # another rank has it


def check_sharding(arch: Architecture, size: int) -> None:
    """Raise ConfigError, naming what is in the way, unless `arch` can be cut for `size` ranks."""
    for what, count in (("attention heads", arch.num_heads), ("inner columns", arch.intermediate_size)):
        if count % size:
            raise _refusal(size, f"does not divide the model's {count} {what}")
    kv = arch.num_kv_heads
    if kv % size and size % kv:
        raise _refusal(size, f"and the model's {kv} key/value heads: neither divides the other")
    if vocab_rows(arch, size) * (size - 1) >= arch.vocab_size:
        raise _refusal(size, f"is too large for a vocabulary of {arch.vocab_size}")


def _refusal(size: int, why: str) -> ConfigError:
    return ConfigError(f"tensor_parallel_size = {size} {why}", param="tensor_parallel_size")


def vocab_rows(arch: Architecture, size: int) -> int:
    """Rows of embedding and LM head on each rank, padding included."""
    return -(-arch.vocab_size // size)


def architecture_of_rank(arch: Architecture, size: int) -> Architecture:
    """`arch` with one rank's heads and inner columns; the vocabulary stays whole."""
    return replace(
        arch,
        num_heads=arch.num_heads // size,
        num_kv_heads=max(1, arch.num_kv_heads // size),
        intermediate_size=arch.intermediate_size // size,
    )


def part_of(name: str, arch: Architecture, shard: Shard) -> Part | None:
    """What `shard` holds of the tensor `name`: None is all of it, ABSENT nothing. `arch`: of the model."""
    if shard.size == 1:
        return None
    layer, _, kind = name.rpartition(".")  # "model.layers.0.self_attn.q_proj", "weight"
    layer = layer.rpartition(".")[2]
    if layer in _BY_VOCAB:
        rows = vocab_rows(arch, shard.size)
        first = shard.rank * rows
        return Part(0, first, min(first + rows, arch.vocab_size), rows)
    if layer in _BY_HEADS or layer in _ADDED_HEADS:
        start, stop = _share(arch.num_heads, shard, arch.head_dim)
    elif layer in _BY_KV_HEADS:
        start, stop = _kv_share(arch, shard)
    elif layer in _BY_INNER or layer in _ADDED_INNER:
        start, stop = _share(arch.intermediate_size, shard, 1)
    else:
        return None
    if layer in _ADDED_HEADS or layer in _ADDED_INNER:
        if kind == "bias":
            return None if shard.rank == 0 else ABSENT
        return Part(1, start, stop, stop - start)
    return Part(0, start, stop, stop - start)


def _share(count: int, shard: Shard, width: int) -> tuple[int, int]:
    own = count // shard.size
    return shard.rank * own * width, (shard.rank + 1) * own * width


def _kv_share(arch: Architecture, shard: Shard) -> tuple[int, int]:
    """The heads that this rank's query heads look at: groups are consecutive."""
    first = shard.rank * arch.num_kv_heads // shard.size
    own = max(1, arch.num_kv_heads // shard.size)
    return first * arch.head_dim, (first + own) * arch.head_dim
