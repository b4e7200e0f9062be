"""From a config to an engine: the simulated one, its coefficients, and names."""

from __future__ import annotations

import pytest

from ellm.worker.api.actor_name import actor_name, epoch_of
from ellm.worker.api.config import CacheConfig, ModelConfig, WorkerConfig, served_name
from ellm.worker.api.errors import ConfigError
from ellm.worker.build import load_engine


def load(path: str) -> object:
    return load_engine(WorkerConfig(model=ModelConfig(path=path)), lambda what, share: None)


def test_the_simulated_engine_takes_its_limits_from_the_config() -> None:
    config = WorkerConfig(
        model=ModelConfig(path="simulated:overhead_s=0.001,vocab_size=50", max_model_len=128),
        cache=CacheConfig(num_blocks=32, block_size=8),
    )
    loaded = load_engine(config, lambda what, share: None)
    limits = loaded.executor.limits
    assert (limits.num_blocks, limits.block_size, limits.max_model_len, limits.vocab_size) == (32, 8, 128, 50)
    assert loaded.core.limits is limits
    assert (loaded.served_name, loaded.device) == ("simulated", "simulated")


@pytest.mark.parametrize("path", ["simulated:speed=3", "simulated:overhead_s", "simulated:overhead_s=fast"])
def test_a_bad_coefficient_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match="simulated:"):
        load(path)


def test_a_model_is_called_what_the_config_says_or_as_its_folder() -> None:
    assert served_name(ModelConfig(path="/models/tiny-llama/")) == "tiny-llama"
    assert served_name(ModelConfig(path="org/model")) == "model"
    assert served_name(ModelConfig(path="/models/x", name="org/y")) == "org/y"
    assert served_name(ModelConfig(path="simulated:overhead_s=1")) == "simulated"


def test_an_epoch_is_read_from_an_actors_name_and_from_no_other() -> None:
    assert epoch_of(actor_name("org/model:v2", "w1", "abc")) == "abc"
    assert epoch_of("SERVE_REPLICA::Worker#abc") is None
    with pytest.raises(AssertionError):
        actor_name("m", "w:1", "abc")
