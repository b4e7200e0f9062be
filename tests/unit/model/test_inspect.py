"""A broken checkpoint is one clear error, found from headers alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.inspect import inspect_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def sharded_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(folder, "llama", max_shard_size="80KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(sharded_whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_whole, tmp_path / "shards"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_checkpoint(str(folder))
    assert "\n" not in caught.value.message


def test_whole_checkpoints_pass(folder: Path, sharded: Path) -> None:
    arch = inspect_checkpoint(str(folder))
    assert (arch.name, arch.eos_token_ids) == ("Qwen2ForCausalLM", (257,))
    assert inspect_checkpoint(str(sharded)).name == "LlamaForCausalLM"


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / SINGLE)


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / SINGLE)


def integers(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].char()
    save_file(tensors, folder / SINGLE)


def cut_off(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-100])


def cut_in_the_header(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:200])


def empty(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 16) + b"no JSON in here!" + b"\0" * 64)


def lying_header(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def malformed_entry(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "data_offsets": [0, 8]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bad_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("nothing")


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (without_tensor, "tensor model.layers.1.self_attn.k_proj.bias is missing"),
        (wrong_shape, r"mlp.up_proj.weight has shape \[95, 48\], config.json makes it \[96, 48\]"),
        (integers, "up_proj.weight has dtype I8; supported are F32, BF16, F16"),
        (cut_off, "model.safetensors is corrupt: cut off: tensor"),
        (cut_in_the_header, "is corrupt: a header of"),
        (empty, "is corrupt: shorter than its header"),
        (garbage, "is corrupt: the header is not JSON"),
        (lying_header, "tensor x has 8 bytes"),
        (malformed_entry, "the entry of tensor x is malformed"),
        (no_weights, "no model.safetensors or model.safetensors.index.json in"),
        (only_a_pickle, "found pytorch_model.bin: convert the checkpoint to safetensors"),
        (no_config, "config.json is missing in"),
        (config_not_json, "config.json cannot be read"),
        (config_a_list, "config.json is not a JSON object"),
        (quantised, r"quantised \(awq\)"),
        (no_tokenizer, "no tokenizer in .*looked for tokenizer.json"),
        (bad_generation_config, "generation_config.json cannot be read"),
    ],
)
def test_breakages_are_named(folder: Path, breakage: Callable[[Path], None], message: str) -> None:
    breakage(folder)
    refused(folder, message)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-0*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"shard {shard.name}, named by {INDEX}, is missing")


def test_an_index_that_is_wrong(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    moved = next(k for k, v in index["weight_map"].items() if v == names[0])
    index["weight_map"][moved] = names[1]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"tensor {moved} is not in {names[1]}")
    index["weight_map"][moved] = "../elsewhere.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "shard ../elsewhere.safetensors")
    (sharded / INDEX).write_text(json.dumps({"metadata": {}}))
    refused(sharded, "has no weight_map")


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "config.json is missing")
    file = tmp_path / "weights"
    file.write_text("")
    refused(file, "is a file; a checkpoint folder is needed")
    refused(tmp_path / "nowhere", "there is no folder")
    with pytest.raises(ConfigError, match="no model is given"):
        inspect_checkpoint("")


def test_a_hub_id_that_cannot_be_fetched() -> None:
    """Tests run with the hub offline."""
    with pytest.raises(ConfigError, match="as a hub id: the hub cannot be reached"):
        inspect_checkpoint("nobody/no-such-model")


def test_old_opt_checkpoints_leave_out_the_first_part_of_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "opt")
    tensors = load_file(tmp_path / SINGLE)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, tmp_path / SINGLE)
    assert inspect_checkpoint(str(tmp_path)).family == "opt"
