"""Models and GPUs by name: the few numbers that decide what a step costs and what fits.

Model numbers are those of the published checkpoints' config.json and tensor sizes; all weights and KV are
bfloat16. GPU numbers are what programs get, not what data sheets promise: each entry says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ellm.worker.api.errors import ConfigError

BYTES = 2  # per weight and KV element, bfloat16

Preset = TypeVar("Preset")


@dataclass(frozen=True, slots=True)
class ModelPreset:
    """A decoder-only transformer."""

    name: str
    num_params: float
    num_embedding_params: float  # looked up, or used for the newest token only: no work per row of a prompt
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def weight_bytes(self) -> float:
        return BYTES * self.num_params

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token, all layers: a key and a value per KV head."""
        return 2 * BYTES * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def row_flop(self) -> float:
        """Linear layers, one token: two operations per weight."""
        return 2.0 * (self.num_params - self.num_embedding_params)

    @property
    def pair_flop(self) -> float:
        """Attention, one (query, key) pair: two operations each for the score and for the value."""
        return 4.0 * self.num_layers * self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class GpuPreset:
    """One GPU of a group that is connected by `peer_bytes_per_s`."""

    name: str
    flop_per_s: float
    memory_bytes_per_s: float
    usable_bytes: float  # for weights and KV; the rest is activations, graphs, fragmentation
    link_bytes_per_s: float  # to the host, per direction
    peer_bytes_per_s: float  # to another GPU of the group, per direction


# Embedding parameters: vocabulary x hidden, twice where input and output are not tied.
MODELS = {
    model.name: model
    for model in (
        ModelPreset("llama2-13b", 13.016e9, 2 * 32_000 * 5_120, 40, 5_120, 40, 40, 128),
        ModelPreset("llama2-70b", 68.977e9, 2 * 32_000 * 8_192, 80, 8_192, 64, 8, 128),
        ModelPreset("llama3-8b", 8.030e9, 2 * 128_256 * 4_096, 32, 4_096, 32, 8, 128),
        ModelPreset("opt-13b", 12.853e9, 50_272 * 5_120, 40, 5_120, 40, 40, 128),
        ModelPreset("opt-30b", 29.975e9, 50_272 * 7_168, 48, 7_168, 56, 56, 128),
        ModelPreset("qwen3-32b", 32.762e9, 2 * 151_936 * 5_120, 64, 5_120, 64, 8, 128),
    )
}

GPUS = {
    gpu.name: gpu
    for gpu in (
        # 312 TFLOP/s and 2.04 TB/s on paper, of which 0.80 and 0.86 are reached; PCIe 4.0 x16 to the host.
        GpuPreset("a100-80g", 250e12, 1.75e12, 72e9, 25e9, 240e9),  # NVLink 3: 0.8 of 300 GB/s
        GpuPreset("a100-80g-pcie", 250e12, 1.75e12, 72e9, 25e9, 20e9),  # the same without NVLink
        # 989 TFLOP/s and 3.35 TB/s on paper, taken at the same shares; PCIe 5.0 x16; NVLink 4.
        GpuPreset("h100", 790e12, 2.88e12, 72e9, 50e9, 360e9),
        # 790 TFLOP/s in bfloat16 matmuls and 4.3 TB/s in copies: measured; 0.95 of 141 GB; as H100 otherwise.
        GpuPreset("h200", 790e12, 4.3e12, 134e9, 50e9, 360e9),
    )
}


def find_model(name: str) -> ModelPreset:
    """Raises ConfigError that lists the known ones."""
    return _find(MODELS, name, "model")


def find_gpu(name: str) -> GpuPreset:
    """Raises ConfigError that lists the known ones."""
    return _find(GPUS, name, "gpu")


def _find(presets: Mapping[str, Preset], name: str, what: str) -> Preset:
    preset = presets.get(name.lower())
    if preset is None:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(presets)}", param=what)
    return preset
