"""A simulated fleet's short day: whatever becomes of workers, every request ends once with its tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ellm.cluster.api.config import ControllerConfig, ScalingConfig
from ellm.loadtest import day
from ellm.loadtest.sim.diurnal import HOURS, MEAN_SHARE, day_arrivals, share_at
from ellm.loadtest.sim.fleet import Fleet
from ellm.loadtest.sim.fleet_metrics import fleet_figures, num_lost
from ellm.loadtest.sim.fleet_run import FleetRun
from ellm.loadtest.sim.fleet_setting import Deaths, FleetSetting, StartUp
from ellm.loadtest.sim.workload import SimRequest
from ellm.router.config import FailoverConfig

QUICK = ScalingConfig(up_after_s=0.5, down_after_s=2.0, cool_down_s=1.0, low_load=0.5)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    path = tmp_path / "lengths.csv"
    rows = [
        f"2023-11-16 18:00:{n:02}.0000000,{rng.integers(200, 1500)},{rng.integers(5, 60)}" for n in range(60)
    ]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def short(trace: Path, **changes: object) -> FleetSetting:
    plain = FleetSetting(
        trace=str(trace),
        min_workers=2,
        max_workers=5,
        duration_s=60.0,
        peak_rate=9.0,
        drain_timeout_s=0.3,
        start_up=StartUp(place_s=0.5, process_s=0.5, weights_bytes_per_s=100e9, warm_up_s=0.5),
        deaths=Deaths(count=4, silent_noticed_s=5.0),
        controller=ControllerConfig(scaling=QUICK),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def simulated(setting: FleetSetting, seed: int = 1) -> tuple[list[SimRequest], FleetRun]:
    requests, left_out = setting.requests(seed)
    assert not left_out
    return requests, Fleet(setting, requests, seed).run()


def test_nobody_is_lost_by_deaths_scaling_and_drains(trace: Path) -> None:
    setting = short(trace)
    requests, run = simulated(setting)
    figures = fleet_figures(setting, requests, run)
    assert list(run.emitted) == [request.output_tokens for request in requests]
    assert set(run.num_ends) == {1}
    assert figures["lost"] == figures["errors"] == 0
    assert {kind for _, kind in run.deaths} == {"crash", "silent"}
    assert figures["moved_by_death"] > 0
    assert figures["moved_by_drain"] > 0
    assert figures["scalings_up"] > 0
    assert figures["scalings_down"] > 0
    assert 0 < figures["gpu_hours"] < setting.max_workers * run.end_s / 3600
    assert max(one["ready"] for one in figures["series"]) > setting.min_workers


def test_a_day_repeats_itself(trace: Path) -> None:
    setting = short(trace, duration_s=12.0)
    one, other = (simulated(setting)[1] for _ in range(2))
    assert (one.first_s, one.last_s, one.scalings) == (other.first_s, other.last_s, other.scalings)


def test_a_fixed_fleet_pays_for_all_of_it(trace: Path) -> None:
    setting = short(trace, min_workers=5, duration_s=12.0, deaths=Deaths(count=0))
    requests, run = simulated(setting)
    figures = fleet_figures(setting, requests, run)
    assert run.scalings == []
    assert figures["gpu_hours"] == pytest.approx(5 * run.end_s / 3600)


def test_a_lost_request_is_counted(trace: Path) -> None:
    """No failover at all: whoever was on a worker that died gets an error, and the figures say so."""
    setting = short(trace, failover=FailoverConfig(max_failovers=0))
    requests, run = simulated(setting)
    lost = num_lost(requests, run)
    assert lost == len(run.failed) > 0
    assert set(run.failed.values()) == {"its workers died"}
    run.emitted[next(n for n in range(len(requests)) if n not in run.failed)] += 1
    assert num_lost(requests, run) == lost + 1, "a token too many is no success"


def test_new_requests_are_refused_when_no_worker_comes_up(trace: Path) -> None:
    setting = short(
        trace, duration_s=20.0, queue_timeout_s=2.0, start_up=StartUp(process_s=500.0), deaths=Deaths(count=6)
    )
    requests, run = simulated(setting)
    assert "no worker is up" in run.failed.values()
    assert num_lost(requests, run) == len(run.failed)


def test_arrivals_follow_the_day() -> None:
    times = np.array(day_arrivals(7200.0, 10.0, 1.7, seed=3))
    assert np.all(np.diff(times) >= 0)
    assert len(times) == pytest.approx(7200 * 10 * MEAN_SHARE, rel=0.03)
    for hour in (4, 11, 15):
        mine = (times >= 300 * (hour - 0.5)) & (times < 300 * (hour + 0.5))
        assert mine.sum() / 300 == pytest.approx(10 * HOURS[hour], rel=0.2)
    assert share_at(24.0) == share_at(0.0) == HOURS[0]
    gaps = np.diff(times[(times > 3000) & (times < 3600)])  # about the peak: nearly one rate
    assert gaps.std() / gaps.mean() == pytest.approx(1.7, rel=0.1)


@pytest.mark.needs_module("matplotlib")
def test_the_command_compares_and_draws(trace: Path, tmp_path: Path) -> None:
    words = f"--trace {trace} --duration-s 4 --deaths 0 --workers 1 2 --peak-rate 2 --only autoscaled --dry"
    keep, picture = tmp_path / "runs.jsonl", tmp_path / "day.svg"
    assert day.main([*words.split(), "--resume", str(keep), "--plot", str(picture)]) == 0
    assert picture.read_text().count("<svg") == 1
    kept = keep.read_text()
    assert len(kept.splitlines()) == 3
    assert day.main([*words.split(), "--resume", str(keep)]) == 0
    assert keep.read_text() == kept, "what was kept is not run again"
