"""A checkpoint found, checked and read: the model on its device, and what was decided on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import ConfigError
from ellm.worker.executor.pool_size import mib
from ellm.worker.executor.resolve import resolve_dtype, resolve_max_model_len
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.computation import Communicator
from ellm.worker.model.hub import local_folder
from ellm.worker.model.inspect import check_weights, read_architecture
from ellm.worker.model.layers import CausalModel
from ellm.worker.model.llama import LlamaModel
from ellm.worker.model.loader import Progress, WeightReader
from ellm.worker.model.opt import OptModel
from ellm.worker.model.shard import architecture_of_rank, check_sharding, part_of, vocab_rows

_Build = Callable[[Ops, Architecture, WeightReader, int, Communicator], CausalModel]
_MODELS: dict[str, _Build] = {"llama": LlamaModel, "opt": OptModel}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on the device, and what was decided on the way."""

    model: CausalModel
    arch: Architecture  # of one rank
    max_model_len: int  # tokens
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int  # as they lie on the device
    folder: Path  # of the checkpoint


def load_model(
    config: WorkerConfig,
    ops: Ops,
    device: torch.device,
    progress: Progress,
    communicator: Communicator,
    available: int,
) -> LoadedModel:
    """Find, check and read the checkpoint, or a rank's part of it. `available`: bytes that it may take.

    Raises ConfigError naming what cannot work."""
    folder = local_folder(config.model.path, config.model.revision)
    arch, shard = read_architecture(folder), communicator.shard
    check_sharding(arch, shard.size)
    entries = check_weights(folder, arch)
    dtype = resolve_dtype(config.model.dtype, arch, device)
    max_model_len = resolve_max_model_len(config.model.max_model_len, arch)
    reader = WeightReader(entries, dtype, device, progress, partial(part_of, arch=arch, shard=shard))
    if reader.needed_bytes > available:
        raise ConfigError(
            f"the weights take {mib(reader.needed_bytes)} and {mib(max(0, available))} are free on {device}; "
            "a smaller dtype or more ranks (tensor_parallel_size) make them fit",
            param="model.path",
        )
    own = architecture_of_rank(arch, shard.size)
    with torch.inference_mode():
        model = _MODELS[arch.family](ops, own, reader, max_model_len, communicator)
    reader.close()
    elements = reader.num_elements
    if arch.tie_word_embeddings and device.type == "cpu":
        elements += vocab_rows(arch, shard.size) * arch.embed_dim  # the head's packed copy
    return LoadedModel(model, own, max_model_len, dtype, device, elements * dtype.itemsize, folder)
