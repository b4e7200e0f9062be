"""Frequencies against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ellm.worker.model.layers import rotary_table
from ellm.worker.model.rope import RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}


@pytest.mark.parametrize(
    "parameters",
    [LLAMA3, LINEAR],
    ids=["llama3", "linear"],
)
def test_scaled_frequencies(parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=parameters
    )
    want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    assert factor == 1.0
    rope = RopeConfig.from_hf({"rope_parameters": parameters}, 128)
    torch.testing.assert_close(torch.tensor(rope.inverse_frequencies()), want, rtol=1e-6, atol=0)


def test_the_table_holds_cos_and_sin_of_every_position() -> None:
    table = rotary_table(RopeConfig(rotary_dim=4, theta=100.0), 50, torch.device("cpu"))
    assert table.shape == (50, 2, 2)
    angles = torch.tensor([[p * 1.0, p * 0.1] for p in range(50)])
    torch.testing.assert_close(table[:, 0], angles.cos())
    torch.testing.assert_close(table[:, 1], angles.sin())


def test_partial_rotation() -> None:
    assert RopeConfig.from_hf({"partial_rotary_factor": 0.5}, 64).rotary_dim == 32
