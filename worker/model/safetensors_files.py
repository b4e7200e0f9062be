"""The headers of a checkpoint's safetensors files: which tensor lies where; reads no weights, needs no torch.

A file is: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.worker.api.errors import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # as the format's own reader


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    file: Path
    name: str  # in that file
    shape: tuple[int, ...]
    dtype: str  # as the header writes it: "F32", "BF16", "F16"

    @property
    def num_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; ConfigError where it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.name} is missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _corrupt(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is corrupt: {why}")


def _raw_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header and the number of data bytes after it."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _corrupt(path, "shorter than its header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise _corrupt(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise _corrupt(path, "the header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "the header is not an object")
    return header, size - 8 - length


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one file, each checked to lie within it. Raises ConfigError for a missing or cut file."""
    try:
        header, data_bytes = _raw_header(path, path.stat().st_size)
    except FileNotFoundError:
        raise ConfigError(f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        try:
            dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
            begin, end = (int(n) for n in info["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise _corrupt(path, f"the entry of tensor {name} is malformed") from None
        if end > data_bytes:
            raise _corrupt(path, f"cut off: tensor {name} ends at byte {end} of {data_bytes}")
        if dtype in ITEM_BYTES and end - begin != ITEM_BYTES[dtype] * math.prod(shape):
            raise _corrupt(
                path, f"tensor {name} has {end - begin} bytes, its shape {list(shape)} needs others"
            )
        entries[name] = TensorEntry(path, name, shape, dtype)
    return entries


def _canonical(name: str) -> str:
    """Older OPT checkpoints leave out the leading `model.`."""
    return f"model.{name}" if name.startswith("decoder.") else name


def _sharded(folder: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{folder / INDEX} has no weight_map")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(f"shard {file}, named by {INDEX}, is missing in {folder}")
    headers = {file: read_header(folder / file) for file in files}
    entries = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ConfigError(f"tensor {name} is not in {file}, where {INDEX} says it is")
        entries[_canonical(name)] = headers[file][name]
    return entries


def find_tensors(folder: Path) -> Mapping[str, TensorEntry]:
    """Every tensor of the checkpoint in `folder`, by canonical name. Raises ConfigError."""
    if (folder / SINGLE).is_file():
        return {_canonical(name): entry for name, entry in read_header(folder / SINGLE).items()}
    if (folder / INDEX).is_file():
        return _sharded(folder)
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
    hint = f" (found {', '.join(others[:3])}: convert the checkpoint to safetensors)" if others else ""
    raise ConfigError(f"no {SINGLE} or {INDEX} in {folder}{hint}")
