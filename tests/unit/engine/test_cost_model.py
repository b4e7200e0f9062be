"""The cost model learns a device from noisy steps, follows it when it changes, and keeps calm at a hiccup."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from statistics import median

import pytest

from ellm.worker.api.cost_model import CostModel, StepFeatures

Device = Callable[[StepFeatures], float]


def gpu(f: StepFeatures) -> float:
    """13B on 1.75 TB/s and 250 TFLOP/s: memory-bound up to 143 rows."""
    linear = max(26e9 / 1.75e12, 26e9 * f.rows / 250e12)
    return 0.003 + linear + f.kv_tokens * 4.7e-7 + f.attention_pairs * 3.3e-9


def cpu(f: StepFeatures) -> float:
    return 1e-3 + 4e-4 * f.rows + 1e-5 * f.decode_rows + f.kv_tokens * 2e-8 + 3e-5 * f.logits_rows


DEVICES = pytest.mark.parametrize("device", [gpu, cpu])


def steps(rng: Random, count: int, *, decode_only: bool = False) -> Iterator[StepFeatures]:
    """Steps of a mixed load: decode rows, and in every fourth step a chunk."""
    for _ in range(count):
        decode = rng.randint(1, 200)
        chunk = 0 if decode_only or rng.random() < 0.75 else rng.randint(1, 2048)
        start = rng.randint(0, 2000) if chunk else 0
        kv = decode * rng.randint(10, 2000) + start + chunk
        yield StepFeatures(decode + chunk, decode, kv, chunk * start + chunk * (chunk + 1) // 2, decode)


def learn(
    model: CostModel, device: Device, count: int, *, seed: int = 0, noise: float = 0.03, hiccups: float = 0.0
) -> None:
    rng = Random(seed)
    for f in steps(rng, count):
        factor = 10.0 if rng.random() < hiccups else 1.0
        model.update(f, device(f) * factor * max(0.5, rng.gauss(1.0, noise)))


def error(model: CostModel, device: Device) -> float:
    """Median relative error on steps it has not seen."""
    fresh = list(steps(Random(99), 300))
    return median(abs(model.predict(f) / device(f) - 1) for f in fresh)


@DEVICES
def test_it_learns_within_a_few_hundred_steps(device: Device) -> None:
    model = CostModel()
    learn(model, device, 300)
    assert error(model, device) < 0.02
    assert model.error_median < 0.04


@DEVICES
def test_hiccups_do_not_move_it(device: Device) -> None:
    model = CostModel()
    learn(model, device, 500, hiccups=0.03)
    assert error(model, device) < 0.02
    assert model.error_median < 0.04 < model.error_mean


@DEVICES
def test_one_hiccup_moves_a_prediction_by_less_than_a_percent(device: Device) -> None:
    model = CostModel()
    learn(model, device, 300)
    f = next(steps(Random(5), 1))
    before = model.predict(f)
    model.update(f, 10 * device(f))
    for calm in steps(Random(6), 4):  # until it has solved again
        model.update(calm, device(calm))
    assert model.predict(f) == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 1.6])
@DEVICES
def test_it_follows_a_device_that_changed(device: Device, factor: float) -> None:
    model = CostModel()
    learn(model, device, 500)

    def changed(f: StepFeatures) -> float:
        return factor * device(f)

    learn(model, changed, 150, seed=1)
    assert error(model, changed) < 0.05
    learn(model, changed, 350, seed=2)
    assert error(model, changed) < 0.02


@DEVICES
def test_it_does_not_forget_chunks_while_there_are_none(device: Device) -> None:
    model = CostModel()
    learn(model, device, 300)
    rng = Random(7)
    for f in steps(rng, 2000, decode_only=True):
        model.update(f, device(f) * rng.gauss(1.0, 0.03))
    assert error(model, device) < 0.03
    chunks = [f for f in steps(Random(98), 300) if f.prefill_rows]
    assert median(abs(model.predict(f) / device(f) - 1) for f in chunks) < 0.15


@DEVICES
def test_no_coefficient_is_negative(device: Device) -> None:
    model = CostModel()
    rng = Random(3)
    for f in steps(rng, 300):
        model.update(f, device(f) * rng.lognormvariate(0.0, 0.5))
        assert min(model.coefficients.values()) >= 0.0
    assert model.predict(StepFeatures(1, 1, 1, 0, 1)) > 0.0


def test_a_known_model_says_what_it_was_told() -> None:
    model = CostModel.known(
        overhead_s=0.01, row_s=1e-4, knee_rows=100, kv_token_s=1e-6, pair_s=1e-8, logits_row_s=1e-5
    )
    assert model.predict(StepFeatures(80, 80, 5000, 0, 80)) == pytest.approx(0.01 + 0.005 + 0.0008)
    assert model.predict(StepFeatures(300, 0, 300, 45_000, 1)) == pytest.approx(
        0.01 + 200e-4 + 300e-6 + 45_000e-8 + 1e-5
    )


def test_a_chunk_may_cost_something_for_being_there() -> None:
    """However small it is: rows alone cannot say that."""

    def device(f: StepFeatures) -> float:
        return cpu(f) + (4e-3 if f.rows > f.decode_rows else 0.0)

    rng, told, without = Random(1), CostModel(chunk_term=True), CostModel()
    for _ in range(400):
        decode, n = rng.randint(1, 30), rng.choice((0, 0, 0, 1, 3, 20, 64, 128, 200))
        features = StepFeatures(decode + n, decode, 150 * decode + n, n * n // 2, decode)
        told.update(features, device(features))
        without.update(features, device(features))
    small = StepFeatures(12, 10, 2_002, 0, 10)
    assert told.predict(small) == pytest.approx(device(small), rel=0.02)
    assert told.coefficients["chunk_s"] == pytest.approx(4e-3, rel=0.01)
    assert abs(without.predict(small) / device(small) - 1.0) > 0.2
    again = CostModel.from_dict(json.loads(json.dumps(told.to_dict())))
    assert again.predict(small) == told.predict(small)
    old = without.to_dict()
    del old["chunk_term"]  # of a file that was written before
    assert CostModel.from_dict(old).predict(small) == without.predict(small)


def test_it_goes_on_from_a_file() -> None:
    model = CostModel()
    learn(model, gpu, 200)
    copy = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    for f in steps(Random(1), 20):
        assert copy.predict(f) == model.predict(f)
    learn(copy, gpu, 100, seed=4)
    assert error(copy, gpu) < 0.02


@pytest.mark.parametrize("damage", [{"version": 2}, {"theta": [1.0]}, {"a": [[1.0]]}])
def test_a_foreign_file_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cost model"):
        CostModel.from_dict(CostModel().to_dict() | damage)


def test_before_the_first_step_it_knows_nothing() -> None:
    model = CostModel()
    assert model.predict(StepFeatures(1, 1, 1, 0, 1)) == 0.0
    assert model.error_median == model.error_mean == 0.0
    model.update(StepFeatures(1, 1, 1, 0, 1), 0.0)  # a clock that did not move
    assert model.num_steps == 0


def test_a_slow_first_step_is_soon_forgotten() -> None:
    model = CostModel()
    model.update(StepFeatures(1, 1, 10, 0, 1), 30.0)
    learn(model, cpu, 60)
    assert error(model, cpu) < 0.05
