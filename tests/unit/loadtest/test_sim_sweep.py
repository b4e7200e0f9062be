"""The sweep: its grid, its comparison by hand, and going on where it was cut off."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from ellm.loadtest.sim import sweep
from ellm.loadtest.sim.plots import plot_curves
from ellm.loadtest.sim.run import Task, run_tasks
from ellm.loadtest.sim.setting import Setting


def arguments(*words: str) -> argparse.Namespace:
    return sweep._parser().parse_args(words)


def test_the_grid_scales_slo_load_and_requests() -> None:
    words = ("--models", "llama2-13b", "llama3-8b", "--loads", "0.5", "1.5", "--slo-ratios", "2")
    points = list(sweep.grid(arguments(*words, "--cvs", "1", "4", "--num-requests", "100")))
    assert len(points) == 2 * 2 * 2
    first, last = points[0].setting, points[-1].setting
    assert first.tpot_slo_ms == pytest.approx(2 * 44.14, rel=0.001)
    assert (first.load, first.cv, last.load, last.cv) == (0.5, 1.0, 1.5, 4.0)
    # 56,112 tokens hold 45 contexts of 1,240; 256 places are fewer than what fits of Llama-3-8B.
    assert first.num_requests == pytest.approx(4 * 45, abs=8)
    assert last.num_requests == 4 * 256


def figures(goodput: float, *, window: float = 0.0, strict: float = 0.0, ttft: float = 1.0) -> dict[str, Any]:
    return {
        "goodput_tok_s": goodput,
        "goodput_of_bound": goodput / 1000,
        "goodput_strict_tok_s": strict,
        "slo_attainment": 0.9,
        "ttft_mean_s": ttft,
        "throughput_tok_s": 1000.0,
        "window": {"goodput_tok_s": window},
    }


def test_a_row_by_hand() -> None:
    point = next(sweep.grid(arguments("--loads", "0.9", "--slo-ratios", "1.5")))
    runs = {
        "adaptive": [figures(900.0, window=90.0, strict=80.0), figures(700.0, window=90.0, strict=80.0)],
        "a": [figures(1000.0, window=50.0, strict=40.0), figures(400.0, window=50.0, strict=40.0)],
        "b": [figures(500.0, window=100.0, strict=0.0), figures(600.0, window=100.0, strict=0.0)],
    }
    row = sweep.compare(point, "adaptive", runs)
    assert (row["load"], row["SLO/T"], row["against"]) == ("0.9", "1.5", "a")
    assert (row["goodput"], row["best"]) == (800.0, 700.0)
    assert row["ratio"] == pytest.approx(800 / 700)
    assert row["ratio worst seed"] == pytest.approx(0.9)
    assert row["ratio window"] == pytest.approx(0.9)
    assert row["ratio strict"] == pytest.approx(2.0)
    assert row["ratio raw"] == 1.0


def test_what_has_been_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(rate=5.0, num_requests=5)
    tasks: list[Task] = [(setting, "full-chunked", 1), (setting, "full-chunked", 2)]
    ran: list[Task] = []

    def counted(left: list[Task], *, jobs: int) -> Any:
        ran.extend(left)
        return run_tasks(left, jobs=jobs)

    monkeypatch.setattr(sweep, "run_tasks", counted)
    kept = tmp_path / "runs.jsonl"
    first = sweep.run_all(tasks[:1], kept, jobs=1)
    with kept.open("a") as file:
        file.write('{"key": "cut off')
    kept.write_text(kept.read_text() + "\n")
    both = sweep.run_all(tasks, kept, jobs=1)
    assert ran == tasks
    assert both[0] == first[0]
    assert both[0] != both[1]


def test_a_sweep_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--loads 1.2 --slo-ratios 1.5 --seeds 1 2 --num-requests 12 --kv-bytes 4e9 --name tiny --baselines"
    )
    assert sweep.main([*words.split(), "full-chunked", "full-recompute", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-tiny.json")
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 1
    assert len(result["raw"]) == 3 * 2
    assert result["rows"][0]["goodput"] > 0
    assert "6/6 runs" in capsys.readouterr().err


@pytest.mark.needs_module("matplotlib")
def test_curves_of_goodput_over_slos(tmp_path: Path) -> None:
    settings = [
        {"model": "m", "gpu": "g", "load": load, "cv": 1.7, "tpot_slo_ms": slo}
        for load in (0.5, 1.5, 2.0, 3.0)
        for slo in (80.0, 50.0)
    ]
    raw = [
        {"setting": setting, "policy": policy, "seed": seed, "goodput_tok_s": 100.0 * seed}
        for setting in settings
        for policy in ("a", "b")
        for seed in (1, 2)
    ]
    plot_curves(raw, str(tmp_path / "curves.svg"))
    text = (tmp_path / "curves.svg").read_text()
    assert text.count("<!-- m on g, load") == 4  # matplotlib writes each text as a comment beside its glyphs
    assert text.count("<!-- b -->") == 4


def test_a_mistake_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--baselines", "fastest"]) == 2
    assert "unknown policy 'fastest'" in capsys.readouterr().err
