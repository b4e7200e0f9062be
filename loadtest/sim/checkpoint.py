"""A model preset from a Hugging Face folder: its config.json alone, no weights and no torch.

Weights and KV are taken as bfloat16, as in the presets, whatever the folder stores. A sliding window is not
known here: every token of the context counts.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path

from ellm.loadtest.sim.presets import MODELS, ModelPreset
from ellm.loadtest.sim.presets import find_model as find_preset
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.weights import LM_HEAD, embedding_name, expected_shapes


@lru_cache
def read_preset(folder: str) -> ModelPreset:
    """Raises ConfigError for a config.json that is missing, or that describes no model we can serve."""
    path = Path(folder)
    arch = read_architecture(path)
    shapes = expected_shapes(arch)
    looked_up = (embedding_name(arch), LM_HEAD)
    return ModelPreset(
        name=path.resolve().name,
        num_params=float(sum(map(prod, shapes.values()))),
        num_embedding_params=float(sum(prod(shapes[name]) for name in looked_up if name in shapes)),
        num_layers=arch.num_layers,
        hidden=arch.hidden_size,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
    )


def find_model(name: str) -> ModelPreset:
    """A preset by name, or a folder. Raises ConfigError for what is neither."""
    if name.lower() not in MODELS and Path(name).is_dir():
        return read_preset(name)
    return find_preset(name)
