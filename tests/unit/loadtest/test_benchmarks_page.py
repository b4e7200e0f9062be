"""docs/benchmarks.md is what the result files give, and says where we lose."""

from __future__ import annotations

import json
from pathlib import Path

from ellm.loadtest.benchmarks_page import PAGE, cell, newest_results, render
from ellm.loadtest.result import RESULTS, Result


def test_page_is_generated_from_the_results() -> None:
    assert PAGE.read_text() == render(newest_results()), "run python -m ellm.loadtest.benchmarks_page"


def test_every_result_file_says_how_it_was_made() -> None:
    paths = list(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        for key in ("name", "date", "commit", "device", "seed", "command", "versions", "rows"):
            assert result.get(key) not in (None, ""), f"{path.name} lacks {key}"


def test_losses_come_first_and_the_newest_run_wins(tmp_path: Path) -> None:
    rows = [
        {"side": "peer", "concurrent": 8, "ratio": 0.5, "against": "peer"},
        {"side": "slow", "ratio": 2.0},
    ]
    old = Result("engine", "Engine", "", "make bench", rows, date="2026-01-01")
    new = Result("engine", "Engine", "", "make bench", [{**rows[0], "ratio": 0.75}], date="2026-02-01")
    old.write(tmp_path)
    new.write(tmp_path)
    page = render(newest_results(tmp_path))
    assert "0.75x peer: side peer, concurrent 8 (Engine)" in page
    assert page.index("Where we lose") < page.index("## Engine")
    assert "0.5x" not in page
    assert "2026-01-01" not in page


def test_the_cost_of_strict_is_said(tmp_path: Path) -> None:
    shares = {1: 0.5, 8: 0.9, 32: 0.98}
    rows = [
        {"side": "ellm-fast", "concurrent": n, "peak MiB": 700.0, "STRICT / FAST decode": share}
        for n, share in shares.items()
    ]
    Result("engine", "Engine", "", "make bench", [{"side": "ellm", "concurrent": 1}, *rows]).write(tmp_path)
    page = render(newest_results(tmp_path))
    expected = (
        "STRICT / FAST decode: 0.9 in the median of its rows, 0.5 at worst (side ellm-fast, concurrent 1)"
    )
    assert expected in page
    assert "Where we lose" not in page  # against no one


def test_cells_are_short() -> None:
    assert cell(1234.4) == "1,234"
    assert cell(0.123456) == "0.123"
    assert cell(123.4) == "123"
    assert cell(None) == "-"
    assert cell(12345) == "12,345"
    assert cell("x") == "x"
