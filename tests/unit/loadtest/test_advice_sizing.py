"""What `ellm plan` reckons before it simulates, against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ellm.loadtest.sim.checkpoint import find_model
from ellm.loadtest.sim.device import OVERHEAD_S, Device
from ellm.loadtest.sim.layouts import Sized, host_gb, num_requests, rates, size_up
from ellm.loadtest.sim.presets import MODELS, find_gpu
from ellm.loadtest.sim.setting import Setting
from ellm.loadtest.sim.sizing import (
    Demand,
    Sizing,
    best_layout,
    first_token_s,
    literal_ratio,
    mean_step_s,
    prices,
    size,
    timely_running,
)
from ellm.loadtest.sim.workload import SimRequest
from ellm.worker.api.cost_model import CostModel
from ellm.worker.api.errors import ConfigError

A100 = Device(MODELS["llama2-13b"], find_gpu("a100-80g"))
WEIGHTS_S = 26.032e9 / 1.75e12
KV_S = 819_200 / 1.75e12
TOKENS = 56_112  # (72e9 - 26.032e9) / 819,200, in whole blocks of 16

LLAMA2_13B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 5_120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "max_position_embeddings": 4_096,
    "dtype": "float16",
    "eos_token_id": 2,
}


def request(prompt: int, output: int) -> SimRequest:
    return SimRequest(0.0, prompt, output, output)


ALIKE = [request(100, 1_000)] * 3  # a decode step reads 100 + 500.5 tokens of each in the mean


def sized(**fields: object) -> Sized:
    setting = Setting(tpot_slo_ms=100.0, **fields)  # type: ignore[arg-type]
    return size_up(setting, [1])


def test_a_folder_is_read_as_its_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_13B))
    found, preset = find_model(str(tmp_path)), MODELS["llama2-13b"]
    assert found.num_params == 13_015_864_320
    assert found.num_params == pytest.approx(preset.num_params, rel=1e-4)
    same = replace(found, name=preset.name, num_params=preset.num_params)
    assert same == preset


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_13B | {"tie_word_embeddings": True}))
    found = find_model(str(tmp_path))
    assert found.num_params == 13_015_864_320 - 32_000 * 5_120
    assert found.num_embedding_params == 32_000 * 5_120


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        find_model(str(tmp_path))


def test_demand_is_what_a_decode_step_sees() -> None:
    demand = Demand.of([request(10, 1), request(20, 3)])
    # contexts of the four steps: 11; 21, 22, 23
    assert demand == Demand(15.0, 2.0, 77 / 4, (55 + 210) / 2)


def test_sizing_by_hand() -> None:
    found = size(A100, ALIKE, tpot_slo_s=0.1, max_num_seqs=256)
    assert found.capacity_tokens == TOKENS
    assert found.full_step_s == pytest.approx(OVERHEAD_S + WEIGHTS_S + TOKENS * KV_S)
    assert found.slo_over_full_step == pytest.approx(0.1 / found.full_step_s)
    assert found.pool_over_weights == pytest.approx(45.968 / 26.032)
    assert found.capacity_gain_limit == pytest.approx(1 + 26.032 / 45.968)
    assert found.requests_held == found.running == pytest.approx(TOKENS / 600.5)
    assert found.limited_by == "memory"
    # Every decode row brings a tenth of a prompt row, whose KV is read too.
    step_s = OVERHEAD_S + WEIGHTS_S + (TOKENS + 0.1 * found.running) * KV_S
    assert found.step_s == pytest.approx(step_s, rel=1e-3)
    assert found.capacity_tok_s == pytest.approx(found.running / found.step_s)
    assert found.capacity_requests_s == pytest.approx(found.capacity_tok_s / 1_000)
    # The planner aims at 0.97 of the SLO, and counts pausing as a tenth.
    assert found.phi == pytest.approx(0.97 * 0.1 / (1.1 * step_s), rel=1e-3)
    assert found.phi_tokens == pytest.approx((found.phi - 1) * TOKENS, rel=1e-3)


def test_rows_limit_before_memory() -> None:
    found = size(A100, ALIKE, tpot_slo_s=0.1, max_num_seqs=10)
    assert (found.running, found.limited_by) == (10.0, "max_num_seqs")
    assert found.phi_tokens == 0.0  # whoever takes turns fits into the pool


def test_the_slo_limits_before_memory() -> None:
    found = size(A100, ALIKE, tpot_slo_s=0.03, max_num_seqs=256)
    assert found.limited_by == "slo"
    assert 0 < found.running < found.requests_held
    assert found.step_s == pytest.approx(0.985 * 0.97 * 0.03, rel=1e-6)
    assert found.phi == 1.0


def test_an_slo_that_nobody_keeps() -> None:
    found = size(A100, ALIKE, tpot_slo_s=0.01, max_num_seqs=256)
    assert (found.running, found.capacity_tok_s, found.limited_by) == (0.0, 0.0, "slo")
    with pytest.raises(ConfigError, match=r"no request of llama2-13b keeps 10 ms per token on a100-80g"):
        size_up(Setting(tpot_slo_ms=10.0), [1])


def test_steps_between_whole_rows() -> None:
    cost = CostModel.known(overhead_s=1.0, kv_token_s=0.1)
    demand = Demand(0.0, 1.0, 10.0, 0.0)
    assert mean_step_s(cost, demand, 2.5) == pytest.approx(1.0 + 2.5)
    assert timely_running(cost, demand, 100.0, 4.25) == pytest.approx(3.25)
    assert timely_running(cost, demand, 3.0, 4.25) == 3.0
    assert timely_running(cost, demand, 3.0, 1.5) == 0.0


def test_prices_by_hand() -> None:
    found = prices(A100)
    recompute_s = 2 * (13.016e9 - 2 * 32_000 * 5_120) / 250e12
    assert found.recompute_s == pytest.approx(recompute_s)
    assert found.link_s == pytest.approx(819_200 / 25e9)
    assert found.read_s == pytest.approx(KV_S)
    assert found.literal_limit_tokens == pytest.approx(A100.full_step_s / recompute_s)
    both = 1 / recompute_s + 25e9 / 819_200
    assert found.literal_limit_with_link_tokens == pytest.approx(A100.full_step_s * both)
    assert found.stream_share * found.link_s == pytest.approx((1 - found.stream_share) * recompute_s)
    assert (found.literal_may_pay, found.literal_with_link_may_pay) == (False, False)
    starved = prices(replace(A100, kv_bytes=500 * 819_200))
    assert (starved.literal_may_pay, starved.literal_with_link_may_pay) == (False, True)
    assert prices(replace(A100, kv_bytes=100 * 819_200)).literal_may_pay


def test_partial_caching_wins_where_memory_is_starved_and_nowhere_else() -> None:
    chat = Demand(20.0, 60.0, 50.0, 210.0)
    starved = replace(A100, kv_bytes=128 * 819_200)
    assert literal_ratio(A100, chat, 0.1, 2048) == 0.0
    assert literal_ratio(starved, chat, 0.1, 2048) > 0.2
    assert literal_ratio(starved, chat, 0.1, 2) == 0.0  # no step has rows for it
    assert literal_ratio(starved, chat, 1e-3, 2048) == 0.0  # nothing is in time


def test_the_first_token_of_the_mean_prompt() -> None:
    rows = 1_000
    demand = Demand(float(rows), 10.0, 1_005.0, 0.5 * rows * (rows + 1))
    knee = round(WEIGHTS_S / A100.row_s)
    linear_s = WEIGHTS_S + (rows - knee) * A100.row_s
    pair_s = 4 * 40 * 40 * 128 / 250e12
    hand = OVERHEAD_S + linear_s + rows * KV_S + demand.prompt_pairs * pair_s
    assert first_token_s(A100, demand) == pytest.approx(hand)


def with_rate(tp: int, rate: float) -> Sizing:
    return replace(size(A100, ALIKE, 0.1, 256), tp=tp, capacity_tok_s_per_gpu=rate)


def test_the_best_layout_is_the_most_per_gpu_and_small_where_it_makes_no_difference() -> None:
    assert best_layout([with_rate(1, 100), with_rate(2, 300), with_rate(4, 250)]).tp == 2
    assert best_layout([with_rate(1, 98), with_rate(2, 100)]).tp == 1


def test_two_gpus_are_worth_more_than_twice_one_where_weights_crowd_memory() -> None:
    plan = size_up(Setting(model="opt-30b", tpot_slo_ms=100.0), [1, 2])
    one, two = (layout.sizing for layout in plan.layouts)
    assert one is not None
    assert two is not None
    assert plan.chosen.tp == plan.setting.tp == 2
    assert 3.0 < two.capacity_tok_s_per_gpu / one.capacity_tok_s_per_gpu < 3.8


def test_layouts_that_cannot_be_are_named() -> None:
    plan = size_up(Setting(model="llama2-70b", tpot_slo_ms=100.0), [1, 2, 3])
    assert [layout.serves for layout in plan.layouts] == [False, True, False]
    assert "138.0 GB of weights" in plan.layouts[0].reason
    assert "must divide" in plan.layouts[2].reason
    with pytest.raises(ConfigError, match=r"llama2-70b cannot run on a100-80g at TP 1: .*138\.0 GB"):
        size_up(Setting(model="llama2-70b", tpot_slo_ms=100.0), [1])


def test_a_layout_that_holds_the_requests_comes_before_a_faster_one() -> None:
    plan = size_up(Setting(workload="leval", tpot_slo_ms=100.0), [1, 2, 4])
    assert plan.layouts[0].share_too_long > 0.1 > 0.01 >= plan.layouts[2].share_too_long
    assert plan.chosen.tp == 4


def test_what_is_tried() -> None:
    plan = sized()
    full = plan.chosen.capacity_requests_s
    assert rates(plan, None, None) == pytest.approx([0.9 * full, 1.2 * full])
    assert rates(plan, None, 0.5) == pytest.approx([0.5 * full])
    assert rates(plan, 3.0, None) == [3.0]
    assert num_requests(plan) == 365  # eight times what a step holds
    assert num_requests(sized(max_num_seqs=4)) == 200
    assert num_requests(sized(workload="leval")) < 350  # long outputs


def test_the_host_tier_that_is_tried_has_room_for_those_who_pause() -> None:
    plan = sized()
    assert host_gb(plan) == pytest.approx(plan.chosen.phi_tokens * 819_200 / 1e9, abs=1.0)
    roomy = size_up(Setting(tpot_slo_ms=1_000.0), [1])
    assert host_gb(roomy) == 64.0
    tight = size_up(Setting(tpot_slo_ms=45.0), [1])
    assert tight.chosen.phi == 1.0
    assert host_gb(tight) == 12.0  # a quarter of the pool
