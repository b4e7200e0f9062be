"""Rows of the side-by-side comparison: medians, and ours beside each side round by round."""

from __future__ import annotations

import pytest

from ellm.loadtest.peer_servers import ELLM, VLLM
from ellm.loadtest.side_by_side import Figures, options_of, parse, rows_of
from ellm.loadtest.text_table import text_table


def figures(tok_s: float, ttft_s: float, tpot_s: float) -> Figures:
    return {
        "output_tok_s": tok_s,
        "ttft_mean_s": ttft_s,
        "tpot_mean_s": tpot_s,
        "itl_p99_s": 2 * tpot_s,
        "cpu_us_per_token": 100.0,
    }


def test_ratios_are_of_the_rounds_not_of_the_medians() -> None:
    # The machine is twice as fast in the second round, for both.
    ours = [figures(110.0, 0.1, 0.01), figures(220.0, 0.05, 0.005), figures(110.0, 0.1, 0.01)]
    theirs = [figures(100.0, 0.2, 0.02), figures(200.0, 0.1, 0.01), figures(200.0, 0.2, 0.02)]
    first, second = rows_of({ELLM: ours, VLLM: theirs}, "float32", 8)
    assert (first["side"], first["dtype"], first["streams"]) == (ELLM, "float32", 8)
    assert not any(name.startswith("ratio") for name in first)
    assert second["tok/s"] == 200.0
    assert second["ratio"] == pytest.approx(1.1)
    assert (second["ratio TTFT"], second["ratio TPOT"]) == (pytest.approx(2.0), pytest.approx(2.0))
    assert second["TTFT, ms"] == pytest.approx(200.0)


def test_all_requests_of_a_row_come_at_once_and_rounds_differ() -> None:
    arguments = parse(["--input", "32", "--output", "4"])
    options = options_of("http://127.0.0.1:1", 8, arguments, seed=5)
    options.check()
    assert (options.rate, options.num_requests, options.prompt_ids) == (float("inf"), 8, True)
    assert options_of("http://127.0.0.1:1", 8, arguments, seed=6) != options


def test_a_table_has_the_columns_of_all_rows() -> None:
    lines = text_table([{"side": "a", "tok/s": 1234.567}, {"side": "bb", "ratio": 1.0}]).splitlines()
    assert [line.split() for line in lines] == [["side", "tok/s", "ratio"], ["a", "1235"], ["bb", "1"]]
    assert len(set(map(len, lines))) == 1
