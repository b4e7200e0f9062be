"""The profile at start: plans are admissible, the fit finds what steps cost, and the next start reads it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoint

from ellm.worker.api.config import CacheConfig, ModelConfig, SchedulerConfig, WorkerConfig
from ellm.worker.api.cost_model import CostModel, StepFeatures
from ellm.worker.build import load_engine
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.profile import (
    cache_folder,
    cache_key,
    fit,
    measure_steps,
    profile_grid,
    profiled_cost_model,
    read_profile,
    write_profile,
)
from ellm.worker.executor.simulated import SimulatedExecutor

SIZES = [(256, 2048, 2048, 400), (64, 256, 2048, 10), (1, 1, 4, 1), (4, 2, 100, 7), (2, 2048, 512, 3)]
TRUTH = {"overhead_s": 4e-3, "row_s": 2e-5, "knee_rows": 16, "kv_token_s": 4e-7, "pair_s": 1e-8}
KEY: Mapping[str, object] = {"model": "m", "threads": 1}


def limits_of(max_len: int, num_blocks: int) -> ModelLimits:
    return ModelLimits(num_blocks, 16, max_len, 1000, (0,))


class Profiled(SimulatedExecutor):
    """Takes a plan that only releases, as a device does."""

    def execute(self, plan: BatchPlan) -> StepResult:
        if plan.entries:
            return super().execute(plan)
        self._take(plan)
        return StepResult(plan.step, (), 0.0)


def truth() -> CostModel:
    return CostModel.known(**TRUTH)  # type: ignore[arg-type]


def silent(what: str, share: float) -> None:
    assert what == "measuring steps"
    assert 0.0 <= share <= 1.0


@pytest.mark.parametrize(("seqs", "rows", "max_len", "num_blocks"), SIZES)
def test_every_step_of_the_grid_could_run_in_service(
    seqs: int, rows: int, max_len: int, num_blocks: int
) -> None:
    grid = list(
        profile_grid(limits_of(max_len, num_blocks), SchedulerConfig(max_num_seqs=seqs, max_step_tokens=rows))
    )
    assert grid
    for entries in grid:
        assert 0 < len(entries) <= seqs
        assert sum(e.num_tokens for e in entries) <= rows
        named = [block for e in entries for block in e.block_ids]
        assert len(set(named)) == len(named)
        assert set(named) <= set(range(num_blocks))
        for entry in entries:
            end = entry.start + entry.num_tokens
            assert 0 <= entry.start < end <= min(max_len, 16 * len(entry.block_ids))
            assert len(entry.token_ids) == entry.num_tokens


def test_the_fit_finds_what_steps_cost_and_nobody_is_left_behind() -> None:
    executor = Profiled(limits_of(2048, 1000), truth(), verify=False)
    measured = measure_steps(executor, SchedulerConfig(), silent, clock=lambda: 0.0)
    assert executor.num_residents == 0
    model = fit(measured)
    assert model.num_steps > 0
    assert model.error_median == 0.0, "no error of a step in service yet"
    for rows in (1, 16, 60, 200):
        features = StepFeatures(rows, rows, 60 * rows, 0, rows)
        assert model.predict(features) == pytest.approx(truth().predict(features), rel=0.1)


def test_time_that_is_up_ends_the_profile_and_large_steps_are_left_out() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.2
        return now

    executor = Profiled(limits_of(2048, 1000), truth(), verify=False)
    some = measure_steps(executor, SchedulerConfig(), silent, clock=clock)
    executor = Profiled(limits_of(2048, 1000), truth(), verify=False)
    every = measure_steps(executor, SchedulerConfig(), silent, clock=lambda: 0.0)
    assert 0 < len(some) < len(every)
    assert max(f.rows for f, _ in some) < max(f.rows for f, _ in every)


def test_the_next_start_reads_what_this_one_measured(tmp_path: Path) -> None:
    executor = Profiled(limits_of(512, 100), truth(), verify=False)
    told: list[str] = []
    first = profiled_cost_model(executor, SchedulerConfig(), KEY, lambda what, _: told.append(what), tmp_path)
    assert told
    told.clear()
    again = profiled_cost_model(executor, SchedulerConfig(), KEY, lambda what, _: told.append(what), tmp_path)
    assert not told
    assert again.to_dict() == first.to_dict()
    executor = Profiled(limits_of(512, 100), truth(), verify=False)
    other = {**KEY, "threads": 2}
    profiled_cost_model(executor, SchedulerConfig(), other, lambda what, _: told.append(what), tmp_path)
    assert told, "a profile with other threads says nothing of this one"


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2]", '{"key": {}, "steps": []}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: str) -> None:
    write_profile(KEY, [(StepFeatures(1, 1, 1, 0, 1), 0.5)], tmp_path)
    (file,) = tmp_path.iterdir()
    assert read_profile(KEY, tmp_path) == [(StepFeatures(1, 1, 1, 0, 1), 0.5)]
    file.write_text(damage)
    assert read_profile(KEY, tmp_path) is None


def test_a_folder_that_cannot_be_written_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    write_profile(KEY, [], blocked / "profiles")
    assert "not kept" in caplog.text


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ellm" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_relative_to(Path("~/.cache").expanduser())


def test_a_real_engine_starts_with_what_its_steps_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(folder, "llama", dtype=torch.bfloat16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = WorkerConfig(
        model=ModelConfig(path=str(folder), device="cpu", jit=False, deterministic=False),
        cache=CacheConfig(num_blocks=40),
        scheduler=SchedulerConfig(max_num_seqs=4, max_step_tokens=64),
        num_threads=1,
    )
    told: list[str] = []
    threads: set[threading.Thread] = set()

    def note(what: str, share: float) -> None:
        told.append(what)
        threads.add(threading.current_thread())

    engine = load_engine(config, note)
    assert "measuring steps" in told
    # Nothing that computed is left: its team of threads would make all others sleep between kernels.
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)
    assert engine.executor.runner.num_resident == 0  # type: ignore[attr-defined]
    assert engine.core.cost_model.predict(StepFeatures(1, 1, 32, 0, 1)) > 0.0
    assert engine.core.report(0.0).num_steps == 0
    engine.core.check()
    told.clear()
    again = load_engine(config, lambda what, _: told.append(what))
    assert "measuring steps" not in told
    assert again.core.cost_model.to_dict() == engine.core.cost_model.to_dict()
    key = cache_key(folder, engine.executor.limits, config.scheduler, {})
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert cache_key(folder, engine.executor.limits, config.scheduler, {}) != key
    engine.executor.close()
    again.executor.close()
