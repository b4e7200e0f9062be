"""What is kept of earlier runs, and who counts in the means."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ellm.loadtest import routing_quality as bench
from ellm.loadtest.routing_quality import OTHERS, OURS, SAME, judge, run_all, source_hash, summary
from ellm.loadtest.sim.cluster_setting import ClusterSetting
from ellm.worker.api.report import WorkerReport

SETTING = ClusterSetting("llama3-8b", "h100", "sharegpt", 8, 20.0)


def test_the_hash_is_of_every_source_that_figures_come_from(tmp_path: Path) -> None:
    for folder in bench.SOURCES:
        (tmp_path / folder / "deeper").mkdir(parents=True)
        (tmp_path / folder / "deeper" / "one.py").write_text("a = 1\n")
    seen = {source_hash(tmp_path), source_hash(tmp_path)}
    assert len(seen) == 1
    for folder in bench.SOURCES:
        (tmp_path / folder / "deeper" / "one.py").write_text("a = 2\n")
        seen.add(source_hash(tmp_path))
    (tmp_path / "router" / "new.py").write_text("")
    seen.add(source_hash(tmp_path))
    assert len(seen) == len(bench.SOURCES) + 2
    root = Path(bench.__file__).parent.parent
    for module in (WorkerReport, ClusterSetting):  # the real folders are where the real code is
        assert any(root / folder in Path(_file(module)).parents for folder in bench.SOURCES)


def _file(thing: type) -> str:
    path = __import__(thing.__module__, fromlist=["x"]).__file__
    assert path is not None
    return path


def test_runs_of_other_code_are_run_again(tmp_path: Path) -> None:
    kept, task = tmp_path / "runs.jsonl", (SETTING, OURS, 1)
    for code in ("", "other code"):  # as they were kept once, and by code that has changed since
        key = json.dumps([*([code] if code else []), asdict(SETTING), *task[1:]])
        with kept.open("a") as file:
            file.write(json.dumps([key, {"goodput_tok_s": -1.0}]) + "\n")
    first = run_all([task], kept, 1)[task]
    assert first["goodput_tok_s"] > 0.0
    assert run_all([task], kept, 1)[task] == first  # CPU times and all: not run again
    assert len(kept.read_text().splitlines()) == 3


def runs(goodput: float, ttft: float, cpu_s: float) -> list[dict[str, float]]:
    return [{"goodput_tok_s": goodput, "ttft_p99_s": ttft, "slo_attainment": 1.0, "cpu_s": cpu_s}] * 2


def test_who_chose_as_power_of_two_did_is_named_and_not_counted() -> None:
    by_policy = {p: runs(100.0 + i, 2.0, i) for i, p in enumerate(OTHERS)} | {OURS: runs(200.0, 1.0, 1.0)}
    apart = judge("B", 0, by_policy)
    same = judge("A", 0, by_policy | {"session": runs(101.0, 2.0, 9.0)})
    assert OTHERS[1] == "power-of-two"
    assert same["session's goodput"] == same["session's p99 TTFT"] == SAME
    assert isinstance(apart["session's goodput"], float)
    means = {row["against"]: row for row in summary([same, apart])}
    assert set(means) == set(OTHERS)
    assert means["session"]["trace"] == "B: geometric mean"
    assert means["session"]["ratio goodput"] == round(200.0 / apart["session's goodput"], 3)
    assert means["power-of-two"]["trace"] == "A, B: geometric mean"
