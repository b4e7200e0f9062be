"""Reads a checkpoint's tensors one at a time, in the dtype and on the device that the model runs in.

A tensor is dropped as soon as its layer has packed it, so the peak is the packed model plus one layer's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ellm.worker.api.errors import ConfigError
from ellm.worker.model.safetensors_files import TensorEntry

# (what is being done, share done from 0 to 1)
Progress = Callable[[str, float], None]


def no_progress(what: str, share: float) -> None:
    """Tells nobody."""


class WeightReader:
    """Tensors by name. Each is read once; `read` hands over a tensor that shares memory with no file."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress = no_progress,
    ) -> None:
        self._entries = entries
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._total = sum(entry.num_bytes for entry in entries.values())
        self._done = 0
        self._open: tuple[Path, Any] | None = None

    def read(self, name: str) -> Tensor:
        """The tensor `name`. Raises ConfigError if its file cannot be read any more."""
        entry = self._entries[name]
        try:
            tensor: Tensor = self._file(entry.file).get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{entry.file} cannot be read: {error}") from None
        self._done += entry.num_bytes
        self._progress("loading weights", self._done / self._total)
        # A copy always: a view of the mapped file would turn a changed file into a crash in service.
        return tensor.to(self._device, self._dtype, copy=True)

    def optional(self, name: str) -> Tensor | None:
        """The tensor `name`, or None where the architecture has none of that name."""
        return self.read(name) if name in self._entries else None

    def joined(self, names: list[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of several linears of equal input, stacked along the output."""
        weights = [self.read(f"{name}.weight") for name in names]
        biases = [self.optional(f"{name}.bias") for name in names]
        given = [bias for bias in biases if bias is not None]
        assert len(given) in (0, len(names)), "either every joined linear has a bias or none"
        if len(names) == 1:
            return weights[0], biases[0]
        return torch.cat(weights), torch.cat(given) if given else None

    def _file(self, path: Path) -> Any:
        """The open file; one at a time, since shards are read in order."""
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt", device="cpu"))
        return self._open[1]

    def close(self) -> None:
        self._open = None
