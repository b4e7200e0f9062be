"""Whether a checkpoint can be served, from its config and file headers alone: no torch, no weights read.

Run before any actor starts, so that a broken checkpoint is one clear error at the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.architecture import Architecture, parse_architecture
from ellm.worker.model.hub import local_folder
from ellm.worker.model.safetensors_files import ITEM_BYTES, TensorEntry, find_tensors, read_json
from ellm.worker.model.shard import check_sharding
from ellm.worker.model.weights import expected_shapes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_architecture(folder: Path) -> Architecture:
    """Parse config.json and, where present, generation_config.json. Raises ConfigError."""
    generation = folder / "generation_config.json"
    return parse_architecture(
        read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None
    )


def check_weights(folder: Path, arch: Architecture) -> Mapping[str, TensorEntry]:
    """The tensors that `arch` needs, by name; ConfigError for the first that is missing or misshapen."""
    found = find_tensors(folder)
    needed = {}
    for name, shape in expected_shapes(arch).items():
        entry = found.get(name)
        if entry is None:
            raise ConfigError(f"tensor {name} is missing in {folder}")
        if entry.shape != shape:
            raise ConfigError(
                f"tensor {name} has shape {list(entry.shape)}, config.json makes it {list(shape)}"
            )
        if entry.dtype not in ITEM_BYTES:
            raise ConfigError(f"tensor {name} has dtype {entry.dtype}; supported are {', '.join(ITEM_BYTES)}")
        needed[name] = entry
    return needed


def check_tokenizer(folder: Path) -> None:
    """ConfigError unless the folder holds a tokenizer of some form."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"no tokenizer in {folder} (looked for {', '.join(_TOKENIZER_FILES)})")


def inspect_checkpoint(path: str, revision: str | None = None, tensor_parallel_size: int = 1) -> Architecture:
    """Find (or download) the checkpoint `path` and check all that can be checked without reading weights.

    Raises ConfigError naming the architecture, key, tensor or file that cannot work, or what so many ranks
    cannot share.
    """
    folder = local_folder(path, revision)
    arch = read_architecture(folder)
    check_sharding(arch, tensor_parallel_size)
    check_weights(folder, arch)
    check_tokenizer(folder)
    return arch
