"""What the papers' policies cost, by hand, and how they are told apart from the engine's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ellm.loadtest.sim.device import Device
from ellm.loadtest.sim.executor import TimedExecutor
from ellm.loadtest.sim.literature import (
    HCache,
    hidden_token_bytes,
    load_block_s,
    make_policy,
    projection_flop,
)
from ellm.loadtest.sim.presets import MODELS, find_gpu
from ellm.loadtest.sim.setting import Setting
from ellm.worker.api.config import SchedulerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError
from ellm.worker.engine.plan import BatchPlan, BlockCopy
from ellm.worker.executor.simulated_link import LinkSpeed

A100 = Device(MODELS["llama2-13b"], find_gpu("a100-80g"), host_bytes=64e9)


@pytest.mark.parametrize(
    ("model", "share"),
    [("llama2-13b", 0.5), ("opt-30b", 0.5), ("llama3-8b", 2.0), ("qwen3-32b", 2.5), ("llama2-70b", 4.0)],
)
def test_hidden_states_beside_kv(model: str, share: float) -> None:
    assert hidden_token_bytes(MODELS[model]) == share * MODELS[model].kv_token_bytes


def test_projecting_a_block_again() -> None:
    # Two matrices of 5,120 x 5,120 in each of 40 layers, two operations per weight.
    assert projection_flop(MODELS["llama2-13b"]) == 2 * 40 * 2 * 5_120 * 5_120
    assert load_block_s("hcache", A100) == pytest.approx(16 * 4.194304e9 / 250e12)
    assert load_block_s("hcache", replace(A100, tp=2)) == pytest.approx(8 * 4.194304e9 / 250e12)
    assert load_block_s("full-offload", A100) == 0.0


def test_the_host_holds_twice_as_many_tokens() -> None:
    setting = Setting(host_gb=64.0)
    kv, hidden = setting.limits("full-offload"), setting.limits("hcache(max_num_seqs=40)")
    assert (kv.block_bytes, hidden.block_bytes) == (16 * 819_200, 16 * 409_600)
    assert (kv.num_host_blocks, hidden.num_host_blocks) == (4_882, 9_765)
    assert replace(hidden, block_bytes=kv.block_bytes, num_host_blocks=kv.num_host_blocks) == kv


def test_a_block_that_was_loaded_costs_computing() -> None:
    limits = Setting(host_gb=64.0).limits("hcache")
    link = LinkSpeed(bytes_per_s=limits.block_bytes / 0.01)
    executor = TimedExecutor(limits, CostModel(), lambda new: 1, link, load_block_s=0.002)
    copies = (BlockCopy(0, 5, 6),)
    saved = executor.execute(BatchPlan(0, (), (), (), 0, 0, saves=copies))
    assert (saved.elapsed_s, saved.copies_done) == (pytest.approx(0.01), (0,))
    loaded = executor.execute(BatchPlan(1, (), (), (), 0, 0, loads=(BlockCopy(1, 5, 6),)))
    assert (loaded.elapsed_s, loaded.copies_done) == (pytest.approx(0.012), (1,))


def test_a_paper_s_policy_is_made_and_the_engine_gets_a_name_that_it_knows() -> None:
    config, policy = make_policy(SchedulerConfig(policy="hcache(max_num_seqs=40)"))
    assert isinstance(policy, HCache)
    assert (config.policy, config.max_num_seqs) == ("full-chunked", 40)
    same = SchedulerConfig(policy="full-chunked(max_num_seqs=40)")
    assert make_policy(same) == (same, None)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("h-cache", "unknown policy 'h-cache'; known: adaptive, .*hcache"),
        ("hcache(depth=2)", "hcache has no parameter 'depth'"),
        ("literal", "literal needs r"),
    ],
)
def test_a_policy_that_cannot_be(policy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(SchedulerConfig(policy=policy))
