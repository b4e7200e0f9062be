"""Reads a checkpoint's tensors one at a time, in the dtype and on the device that the model runs in.

Of a tensor that is cut for several ranks the rank's part alone is read. A tensor is dropped as soon as its
layer has packed it, so the peak is the packed model plus one layer's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.safetensors_files import ITEM_BYTES, TensorEntry
from ellm.worker.model.shard import ABSENT, Part

# (what is being done, share done from 0 to 1)
Progress = Callable[[str, float], None]


def no_progress(what: str, share: float) -> None:
    """Tells nobody."""


def whole(name: str) -> Part | None:
    """The part of each tensor that one rank alone holds."""
    return None


class WeightReader:
    """Tensors by name. Each is read once; `read` hands over a tensor that shares memory with no file."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress = no_progress,
        part_of: Callable[[str], Part | None] = whole,
    ) -> None:
        """`part_of`: what to read of each tensor; see shard.part_of."""
        self._entries = entries
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._part_of = part_of
        self._total = sum(self._part_bytes(name) for name in entries)
        self.num_read_bytes = 0  # of files
        self.num_elements = 0  # handed over, padding included
        self._open: tuple[Path, Any] | None = None

    @property
    def needed_bytes(self) -> int:
        """What all of it will take on the device, padding apart."""
        size = self._dtype.itemsize
        return sum(
            self._part_bytes(name) // ITEM_BYTES[entry.dtype] * size for name, entry in self._entries.items()
        )

    def read(self, name: str) -> Tensor:
        """This rank's part of the tensor `name`. Raises ConfigError if its file cannot be read any more."""
        entry, part = self._entries[name], self._part_of(name)
        try:
            tensor = _read(self._file(entry.file), entry.name, part)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{entry.file} cannot be read: {error}") from None
        self.num_read_bytes += self._part_bytes(name)
        self._progress("loading weights", self.num_read_bytes / self._total)
        # A copy always: a view of the mapped file would turn a changed file into a crash in service.
        out = tensor.to(self._device, self._dtype, copy=True, memory_format=torch.contiguous_format)
        if part is not None and part.stop - part.start < part.length:
            padded = out.new_zeros(part.shape(entry.shape))
            padded.narrow(part.dim, 0, part.stop - part.start).copy_(out)
            out = padded
        self.num_elements += out.numel()
        return out

    def optional(self, name: str) -> Tensor | None:
        """The tensor `name`, or None where the architecture has none of that name or another rank has it."""
        return None if name not in self._entries or self._part_of(name) == ABSENT else self.read(name)

    def joined(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of several linears of equal input, stacked along the output."""
        weights = [self.read(f"{name}.weight") for name in names]
        biases = [self.optional(f"{name}.bias") for name in names]
        given = [bias for bias in biases if bias is not None]
        assert len(given) in (0, len(names)), "either every joined linear has a bias or none"
        if len(names) == 1:
            return weights[0], biases[0]
        return torch.cat(weights), torch.cat(given) if given else None

    def _part_bytes(self, name: str) -> int:
        entry, part = self._entries[name], self._part_of(name)
        if part is None:
            return entry.num_bytes
        shape = (*entry.shape[: part.dim], part.stop - part.start, *entry.shape[part.dim + 1 :])
        return ITEM_BYTES[entry.dtype] * math.prod(shape)

    def _file(self, path: Path) -> Any:
        """The open file; one at a time, since shards are read in order."""
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt", device="cpu"))
        return self._open[1]

    def close(self) -> None:
        self._open = None


def _read(file: Any, name: str, part: Part | None) -> Tensor:
    """A view of the mapped file: what nobody copies from it is not read."""
    if part is None:
        tensor: Tensor = file.get_tensor(name)
    else:
        cut = file.get_slice(name)
        tensor = cut[part.start : part.stop] if part.dim == 0 else cut[:, part.start : part.stop]
    return tensor
