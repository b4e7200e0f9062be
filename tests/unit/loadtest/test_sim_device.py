"""The modelled device: what fits and how long a step takes agree with the arithmetic on paper."""

from __future__ import annotations

import pytest

from ellm.loadtest.sim.device import Device, profile
from ellm.loadtest.sim.presets import GPUS, MODELS, find_gpu, find_model
from ellm.worker.api.cost_model import StepFeatures
from ellm.worker.api.errors import ConfigError


def device(model: str = "llama2-13b", gpu: str = "a100-80g", **fields: float) -> Device:
    return Device(find_model(model), find_gpu(gpu), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "gpu", "ratio"),
    [
        ("llama2-13b", "a100-80g", 1.57),
        ("llama2-13b", "h200", 1.24),
        ("llama3-8b", "a100-80g", 1.29),
        ("llama3-8b", "h200", 1.14),
        ("opt-30b", "a100-80g", 5.97),
        ("opt-30b", "h200", 1.81),
        ("qwen3-32b", "a100-80g", 11.1),
        ("qwen3-32b", "h200", 1.96),
    ],
)
def test_memory_that_weights_leave(model: str, gpu: str, ratio: float) -> None:
    """1 + w / M, computed by hand for each pair."""
    one = device(model, gpu)
    assert 1 + one.model.weight_bytes / one.pool_bytes == pytest.approx(ratio, rel=0.006)


def test_kv_of_a_token() -> None:
    sizes = {name: model.kv_token_bytes for name, model in MODELS.items()}
    assert sizes["llama2-13b"] == sizes["opt-13b"] == 819_200
    assert sizes["llama3-8b"] == 131_072
    assert sizes["llama2-70b"] == 327_680
    assert sizes["qwen3-32b"] == 262_144


def test_prices_of_a_token() -> None:
    """Recompute 101 and 56 microseconds, a read 0.47 and 0.075, on an A100."""
    thirteen, eight = device(), device("llama3-8b")
    assert 1e6 * thirteen.row_s == pytest.approx(101, abs=1)
    assert 1e6 * eight.row_s == pytest.approx(56, abs=0.5)
    assert 1e6 * thirteen.kv_token_s == pytest.approx(0.468, abs=0.001)
    assert 1e6 * eight.kv_token_s == pytest.approx(0.075, abs=0.001)


def test_a_step_by_hand() -> None:
    one, cost = device(), device().cost()
    weights_s = 2 * 13.016e9 / 1.75e12
    row_s = 2 * (13.016e9 - 2 * 32_000 * 5_120) / 250e12
    kv_s = 1_000 * 819_200 / 1.75e12
    decode = cost.predict(StepFeatures(32, 32, 1_000, 0, 32))
    assert decode == pytest.approx(3e-3 + weights_s + kv_s, rel=1e-9)
    chunk = cost.predict(StepFeatures(2_000, 0, 2_000, 2_001_000, 1))
    pairs_s = 2_001_000 * 4 * 40 * 5_120 / 250e12
    assert chunk == pytest.approx(3e-3 + 2_000 * row_s + 2 * kv_s + pairs_s, rel=1e-3)
    assert one.full_step_s == pytest.approx(0.0441, abs=1e-4)


def test_a_group_shares_weights_and_pays_for_talking() -> None:
    one, four = device(), device(tp=4)
    assert four.weights_s == one.weights_s / 4
    assert four.row_s == one.row_s / 4
    assert four.pool_bytes == pytest.approx(4 * 72e9 - one.model.weight_bytes)
    constant, per_row = four.all_reduce_s
    assert constant == pytest.approx(80 * 10e-6)
    assert per_row == pytest.approx(80 * 2 * 3 / 4 * 2 * 5_120 / 240e9)
    rows = StepFeatures(100, 100, 0, 0, 100)
    assert four.cost().predict(rows) == pytest.approx(3e-3 + four.weights_s + constant + 100 * per_row)


def test_transient_blocks_take_their_room_from_the_pool() -> None:
    """Two banks of one layer of forty: 20 of them are as large as a block of the pool."""
    plain, holes = device().limits(), device().limits(num_transient=200)
    assert (plain.num_blocks, holes.num_blocks) == (3_507, 3_497)
    assert holes.num_transient_blocks == 200
    assert holes.max_model_len == 3_497 * 16


def test_what_cannot_be_is_refused() -> None:
    for wrong, message in (
        (device("llama2-70b"), "raise --tp"),
        (device(tp=3), "must divide the 40 KV heads"),
        (device(tp=0), "must divide"),
        (device(kv_bytes=60e9), "beside the weights"),
        (device(kv_bytes=1e6), "too few for any request"),
        (device(host_bytes=-1.0), "host tier"),
        (device(block_size=0), "block size"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong.check()
    for gpu in GPUS:
        device("llama2-70b", gpu, tp=4).check()


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match=r"llama2-13b, llama2-70b, llama3-8b, opt-13b, opt-30b, qwen3-32b"):
        find_model("llama-4")
    with pytest.raises(ConfigError, match=r"a100-80g, .*h100, h200"):
        find_gpu("b200")


def test_what_the_engine_knows_is_learnt() -> None:
    """Close to the truth after a profile, not the truth itself, and learning from it moves nothing there."""
    truth = device().cost()
    before = truth.to_dict()
    learnt = profile(truth, max_rows=2048, max_kv_tokens=56_112)
    assert learnt is not truth
    assert learnt.knees != truth.knees
    for features in (StepFeatures(32, 32, 30_000, 0, 32), StepFeatures(1_054, 30, 50_000, 524_800, 31)):
        assert learnt.predict(features) == pytest.approx(truth.predict(features), rel=0.05)
    learnt.update(StepFeatures(32, 32, 30_000, 0, 32), 1.0)
    assert truth.to_dict() == before
