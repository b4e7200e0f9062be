"""A checkpoint found, checked and read: the model on its device, and what was decided on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ellm.kernels.ops import Ops
from ellm.worker.api.config import WorkerConfig
from ellm.worker.executor.resolve import resolve_dtype, resolve_max_model_len
from ellm.worker.model.architecture import Architecture
from ellm.worker.model.hub import local_folder
from ellm.worker.model.inspect import check_weights, read_architecture
from ellm.worker.model.layers import CausalModel
from ellm.worker.model.llama import LlamaModel
from ellm.worker.model.loader import Progress, WeightReader
from ellm.worker.model.opt import OptModel
from ellm.worker.model.weights import expected_shapes

_Build = Callable[[Ops, Architecture, WeightReader, int], CausalModel]
_MODELS: dict[str, _Build] = {"llama": LlamaModel, "opt": OptModel}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights on the device, and what was decided on the way."""

    model: CausalModel
    arch: Architecture
    max_model_len: int  # tokens
    dtype: torch.dtype
    device: torch.device


def load_model(config: WorkerConfig, ops: Ops, device: torch.device, progress: Progress) -> LoadedModel:
    """Find, check and read the checkpoint. Raises ConfigError naming what cannot work."""
    folder = local_folder(config.model.path, config.model.revision)
    arch = read_architecture(folder)
    entries = check_weights(folder, arch)
    dtype = resolve_dtype(config.model.dtype, arch, device)
    max_model_len = resolve_max_model_len(config.model.max_model_len, arch)
    reader = WeightReader(entries, dtype, device, progress)
    with torch.inference_mode():
        model = _MODELS[arch.family](ops, arch, reader, max_model_len)
    reader.close()
    return LoadedModel(model, arch, max_model_len, dtype, device)


def weight_bytes(loaded: LoadedModel) -> int:
    """Bytes of its weights as they lie on the device."""
    arch = loaded.arch
    elements = sum(math.prod(shape) for shape in expected_shapes(arch).values())
    if arch.tie_word_embeddings and loaded.device.type == "cpu":
        elements += arch.vocab_size * arch.embed_dim  # the head's packed copy
    return elements * loaded.dtype.itemsize
