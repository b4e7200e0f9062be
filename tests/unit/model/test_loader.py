"""Reading weights: shards and dtypes make no difference, memory is the reader's own, progress is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import write_checkpoint

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.inspect import check_weights, read_architecture
from ellm.worker.model.loader import WeightReader

CPU = torch.device("cpu")


def reader(folder: Path, dtype: torch.dtype = torch.float32) -> WeightReader:
    return WeightReader(check_weights(folder, read_architecture(folder)), dtype, CPU)


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", "qwen3")
    write_checkpoint(tmp_path / "many", "qwen3", max_shard_size="80KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    arch = read_architecture(tmp_path / "one")
    one, many = reader(tmp_path / "one"), reader(tmp_path / "many")
    names = list(check_weights(tmp_path / "one", arch))
    assert len(names) == 3 + 2 * 11
    for name in names:
        assert torch.equal(one.read(name), many.read(name)), name


def test_tensors_come_in_the_dtype_asked_for_and_share_no_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(tmp_path / "model.safetensors")[name]
    assert stored.dtype == torch.bfloat16
    weights = reader(tmp_path, torch.bfloat16)
    first = weights.read(name)
    assert torch.equal(first, stored)
    first.zero_()
    assert torch.equal(weights.read(name), stored)
    assert torch.equal(reader(tmp_path).read(name), stored.float())


def test_joined_stacks_weights_and_biases(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
    weight, bias = reader(tmp_path).joined(names)
    assert bias is not None
    assert torch.equal(weight, torch.cat([tensors[f"{n}.weight"] for n in names]))
    assert torch.equal(bias, torch.cat([tensors[f"{n}.bias"] for n in names]))
    plain, none = reader(tmp_path).joined(["model.layers.1.self_attn.o_proj"])
    assert none is None
    assert torch.equal(plain, tensors["model.layers.1.self_attn.o_proj.weight"])


def test_progress_rises_to_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "opt")
    entries = check_weights(tmp_path, read_architecture(tmp_path))
    told: list[tuple[str, float]] = []
    weights = WeightReader(entries, torch.float32, CPU, lambda what, share: told.append((what, share)))
    for name in entries:
        weights.read(name)
    shares = [share for _, share in told]
    assert {what for what, _ in told} == {"loading weights"}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == len(entries)


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    weights = reader(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        weights.read("model.norm.weight")
