"""Figures are what their definitions say, a late send counts, and a search finds the rate that it should."""

from __future__ import annotations

import json
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ellm.loadtest.generator import report_html, report_json, text
from ellm.loadtest.generator.options import Options, Slo
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.run import Run
from ellm.loadtest.generator.summary import attains, attains_strictly, percentile, summarise
from ellm.loadtest.generator.sweep import parse_shares, parse_sweep, search
from ellm.loadtest.generator.target import Target
from ellm.loadtest.generator.timeline import timeline
from ellm.loadtest.generator.worker_states import worker_row
from ellm.worker.api.errors import ConfigError


def record(index: int, due: float, times: list[float], late: float = 0.0, **changes: Any) -> Record:
    made = Record(index, index, 0, due, 10, len(times), sent_s=due + late, prompt_tokens=10, status=200)
    made.chunk_times = array("d", times)
    made.output_tokens = len(times)
    made.end_s = times[-1] if times else due
    for name, value in changes.items():
        setattr(made, name, value)
    return made


STEADY = record(0, 1.0, [1.5, 1.6, 1.7, 1.8])
SLOW = record(1, 2.0, [2.2, 3.2], late=0.1)
SINGLE = record(2, 3.0, [3.1])
FAILED = record(3, 4.0, [], outcome="failed", error="HTTP 503: unavailable")
LEFT = record(4, 4.0, [4.5], outcome="cancelled")
WARMUP = record(5, 0.5, [0.9], warmup=True)
ALL = [STEADY, SLOW, SINGLE, FAILED, LEFT, WARMUP]


def test_the_figures_of_a_run_by_hand() -> None:
    s = summarise(ALL, Slo(ttft_s=0.5, tpot_s=0.2))
    assert (s["completed"], s["failed"], s["cancelled"]) == (3, 1, 1)
    assert s["duration_s"] == pytest.approx(3.5)  # from 1.0, when the first was due, to 4.5
    assert s["ttft_mean_s"] == pytest.approx((0.5 + 0.2 + 0.1) / 3)
    assert s["tpot_mean_s"] == pytest.approx((0.1 + 1.0) / 2)  # a single token has none
    assert s["itl_mean_s"] == pytest.approx((3 * 0.1 + 1.0) / 4)
    assert s["e2e_mean_s"] == pytest.approx((0.8 + 1.2 + 0.1) / 3)
    assert s["output_tokens"] == 7
    assert s["output_tok_s"] == pytest.approx(7 / 3.5)
    assert s["goodput_req_s"] == pytest.approx(2 / 3.5)
    assert s["goodput_tok_s"] == pytest.approx(5 / 3.5)
    assert s["slo_attainment"] == pytest.approx(
        2 / 4
    )  # a failure has missed, a client that left counts nowhere
    assert s["errors"] == {"HTTP 503: unavailable": 1}
    assert s["send_late_max_s"] == pytest.approx(0.1)


def test_a_late_send_counts_from_when_it_was_due() -> None:
    s = summarise([SLOW], Slo())
    assert s["ttft_mean_s"] == pytest.approx(0.2)
    assert s["ttft_from_send_mean_s"] == pytest.approx(0.1)
    assert s["slo_attainment"] is None


def test_nothing_completed_is_no_division() -> None:
    s = summarise([FAILED], Slo(ttft_s=1.0))
    assert (s["completed"], s["ttft_mean_s"], s["slo_attainment"]) == (0, None, 0.0)
    assert text.summary_lines({"summary": s})


def test_a_mean_may_hide_what_every_token_shows() -> None:
    slo = Slo(tpot_s=0.1)
    stalled = record(0, 0.0, [0.1, 0.11, 0.12, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96])
    assert attains(stalled, slo)
    assert not attains_strictly(stalled, slo)  # token 3 was due at 0.1 + 0.1 * (3 + 4) = 0.8
    assert attains_strictly(record(0, 0.0, [0.1, 0.49]), slo)
    assert not attains_strictly(record(0, 0.0, [0.1, 0.7]), Slo(tpot_s=1.0, e2e_s=0.5))


def test_tokens_of_a_chunk_are_the_servers_or_shared_out() -> None:
    known = record(0, 0.0, [1.0, 2.0], output_tokens=3, chunk_tokens=array("i", [1, 2]))
    assert known.token_times() == [1.0, 2.0, 2.0]
    unknown = record(0, 0.0, [1.0, 2.0], output_tokens=4)
    assert unknown.token_times() == [1.0, 1.0, 2.0, 2.0]
    assert unknown.tpot_s == pytest.approx(1 / 3)


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_numpys(percent: float) -> None:
    values = sorted(np.random.default_rng(0).normal(size=37).tolist())
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_the_timeline_adds_up() -> None:
    t = timeline(ALL)
    assert sum(t["due_req_s"]) == 6
    assert sum(t["ended_req_s"]) == 5
    assert sum(t["failed_req_s"]) == 1
    assert sum(t["output_tok_s"]) == pytest.approx(9)
    busy = sum(r.end_s - r.sent_s for r in ALL)
    assert sum(t["in_flight"]) == pytest.approx(busy)
    assert len({len(column) for name, column in t.items() if name != "step_s"}) == 1


def test_a_search_finds_the_highest_rate_of_each_share() -> None:
    rates: list[float] = []

    def measure(rate: float) -> dict[str, Any]:
        rates.append(rate)
        return {"summary": {"slo_attainment": min(1.0, 1.0 - 0.02 * (rate - 5.0))}}  # 90 % at 10, 99 % at 5.5

    found = search(1.0, [0.9, 0.95, 0.99], measure)
    for share, rate in ((0.9, 10.0), (0.95, 7.5), (0.99, 5.5)):
        low, high = found.rates[share], found.not_above[share]
        assert low is not None
        assert high is not None
        assert low <= rate <= high <= 1.051 * low
    assert len(rates) == len(set(rates)) < 20


def test_a_search_that_nothing_can_satisfy_ends() -> None:
    found = search(1.0, [0.9], lambda rate: {"summary": {"slo_attainment": 0.5}})
    assert found.rates == {0.9: None}
    always = search(1.0, [0.9], lambda rate: {"summary": {"slo_attainment": 1.0}})
    assert always.not_above == {0.9: None}
    assert len(always.runs) <= 24


def test_sweeps_and_shares_are_read_or_refused() -> None:
    assert parse_sweep("rate=1:3") == [1.0, 2.0, 3.0]
    assert parse_sweep("rate=1:2:0.5") == [1.0, 1.5, 2.0]
    assert parse_sweep("rate=4,8,16") == [4.0, 8.0, 16.0]
    assert parse_sweep("rate=7") == [7.0]
    assert parse_shares("99,90") == [0.9, 0.99]
    for wrong in ("1:10", "rate=3:1", "rate=a", "rate=1:2:0", "rate=1:2:1:1", "cv=1:2"):
        with pytest.raises(ConfigError, match="--sweep"):
            parse_sweep(wrong)
    with pytest.raises(ConfigError, match="above 0"):
        parse_sweep("rate=0:4")
    for wrong in ("x", "0", "101"):
        with pytest.raises(ConfigError, match="--search"):
            parse_shares(wrong)


def a_result(rate: float = 2.0, **changes: Any) -> dict[str, Any]:
    slo = Slo(ttft_s=0.5, tpot_s=0.2)
    options = Options("http://127.0.0.1:1", rate=rate, api_key="secret", slo=slo, headers={"X-A": "hidden"})
    target = Target("http://h:1", "chat", False, "h", "127.0.0.1", 1, "/v1", "m<b>")
    workers = [
        worker_row(
            {"id": "w0", "num_blocks": 10, "block_size": 16, "running_tokens": 50, "parked_tokens": 20}, t
        )
        for t in (0.0, 1.0)
    ]
    run = Run(options, target, ALL, 1, 1.7e9, 0.1, workers=workers)
    result = report_json.result_of(run)
    result["summary"].update(changes)
    return result


def test_json_holds_every_request_and_no_secret(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    report_json.write_json(path, a_result())
    whole = Path(path).read_text()
    assert "secret" not in whole
    assert "hidden" not in whole
    read = report_json.read_json(path)
    wanted = (
        "completed failed output_tok_s ttft_mean_s ttft_p99_s tpot_mean_s itl_p99_s e2e_mean_s goodput_req_s"
    )
    assert set(wanted.split()) <= set(read["summary"])
    assert len(read["requests"]) == 5  # without the warm-up
    assert read["requests"][0]["chunk_offsets_s"] == [0.0, 0.1, 0.2, 0.3]
    assert read["workers"][0]["free_tokens"] == 160 - 50 - 20
    (tmp_path / "b.json").write_text(json.dumps({"sweep": []}))
    with pytest.raises(ConfigError, match="no result"):
        report_json.read_json(str(tmp_path / "b.json"))


@pytest.mark.parametrize("page", ["run", "sweep", "compare"])
def test_a_report_stands_alone(page: str) -> None:
    a, b = a_result(), a_result(4.0, ttft_mean_s=1.0)
    html = {
        "run": lambda: report_html.run_page(a),
        "sweep": lambda: report_html.sweep_page([b, a], {"90": 2.0, "99": None}),
        "compare": lambda: report_html.compare_page(a, b, ("a.json", "b.json")),
    }[page]()
    assert html.count("<svg") == html.count("</svg>") >= 4
    assert "<script" not in html
    assert not re.search(r"(?:src|href)=", html)
    assert "m<b>" not in html
    assert "nan" not in html
    if page == "run":
        assert "Memory of the workers" in html
        assert "Goodput against the SLO" in html


def test_a_comparison_names_what_is_better_and_what_was_not_the_same() -> None:
    lines = text.compare_lines(a_result(), a_result(4.0, ttft_mean_s=1.0), ("a", "b"))
    (ttft,) = (line for line in lines if line.startswith("ttft_mean"))
    assert ttft.split()[-1] == "A"
    assert "not the same: rate: 2.0 and 4.0" in lines
