"""The parts of the KV-starved comparison that know no server: what comes, what is counted, the table."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from ellm.loadtest.generator.record import Record
from ellm.loadtest.peer_servers import VLLM
from ellm.loadtest.sim.metrics import measure
from ellm.loadtest.starved_peer_rows import ADAPTIVE, CHUNKED, Outcome, parse_counters, with_ratios
from ellm.loadtest.starved_workload import (
    Spec,
    ended_bodies,
    endless_bodies,
    expected_of,
    make_workload,
    same_share,
)
from ellm.loadtest.timed_requests import TokenReader
from ellm.loadtest.unforeseen import peak_context

SPEC = Spec(requests=50, prompt=16, output=32, cap=128, trace=None, seed=3)


def test_a_workload_follows_from_its_seed() -> None:
    assert make_workload(SPEC) == make_workload(SPEC)
    assert make_workload(SPEC).prompts != make_workload(replace(SPEC, seed=4)).prompts


def test_arrivals_begin_at_once_and_keep_the_rate() -> None:
    due = make_workload(SPEC).due_s(5.0)
    assert due[0] == 0.0
    assert due == sorted(due)
    assert due[-1] == pytest.approx(SPEC.requests / 5.0)


def test_a_trace_gives_its_rhythm(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{second:02}.0000000,100,10" for second in (1, 2, 4, 8)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    work = make_workload(replace(SPEC, requests=4, trace=trace))
    assert work.arrivals == pytest.approx([0.0, 4 / 7, 12 / 7, 4.0])
    with pytest.raises(ValueError, match="only 4"):
        make_workload(replace(SPEC, requests=5, trace=trace))


def test_each_request_is_ended_where_its_own_continuation_says() -> None:
    work = make_workload(replace(SPEC, requests=2))
    continuations = [[5, 5, 6, 7, 8, 9], [4, 3, 3, 3, 3, 3]]
    expected = expected_of(continuations, [4, 6])
    assert expected == [[5, 5, 6, 7], [4, 3]]  # the last token that is new, where a later one is not
    bodies = ended_bodies(work, expected)
    assert [body["stop_token_ids"] for body in bodies] == [[7], [3]]
    assert {body["max_tokens"] for body in bodies} == {SPEC.cap}  # says nothing of the end
    assert all("stop_token_ids" not in body for body in endless_bodies(work))


def test_context_at_its_peak() -> None:
    times = [array("d", [1.0, 2.0, 3.0]), array("d", [2.5, 4.0])]
    # At 2.5 the first has 10 + 2, the second 20 + 1; at 3.0 the first has one more and goes.
    assert peak_context([[0] * 10, [0] * 20], times) == 33


def test_share_of_equal_answers() -> None:
    assert same_share([[1, 2], [3]], [[1, 2], [3, 4]]) == 0.5


PAGE = """\
# HELP vllm:num_preemptions_total Cumulative number of preemptions.
vllm:num_preemptions_total{engine="0",model_name="bench"} 3.0
ellm_num_preemptions_total{model_name="bench"} 4
ellm_num_parks_total{model_name="bench"} 7
ellm_num_parks_created{model_name="bench"} 1.7e9
ellm_recomputed_tokens_total{model_name="bench"} 1.5e3
"""


def test_counters_of_both_servers() -> None:
    found = parse_counters(PAGE)
    assert (found["preempted"], found["parked"], found["recomputed"]) == (7.0, 7.0, 1500.0)
    assert found["loaded"] == 0.0


def outcome(side: str, host: str, gap_s: float, preempted: float = 0.0) -> Outcome:
    """Two requests: one with a token each `gap_s`, one each 0.01 s, both with a first token after `gap_s`."""
    slow, quick = [gap_s * (i + 1) for i in range(10)], [gap_s + 0.01 * i for i in range(10)]
    metrics = measure([0.0, 0.0], [array("d", slow), array("d", quick)], 0.02)
    counted = {"preempted": preempted, "parked": 0.0, "recomputed": 0.0}
    return Outcome(side, host, "full pool", 0.1, 2**20, 0, metrics, 1.0, 20, counted, 0.0)


def test_ours_is_set_beside_vllm_of_the_same_host_setting() -> None:
    outcomes = [
        outcome(ADAPTIVE, "off", 0.01),
        outcome(CHUNKED, "off", 0.05, preempted=9),
        outcome(VLLM, "off", 0.05, preempted=10),
        outcome(ADAPTIVE, "on", 0.01),
    ]
    ours, chunked, theirs, alone = with_ratios(outcomes)
    assert ours["ratio"] == pytest.approx(ours["goodput"] / theirs["goodput"])
    assert ours["ratio"] > 2.0  # both attain in a fifth of the time, against one
    assert ours["ratio TTFT"] == pytest.approx(5.0)
    assert chunked["preempted by vLLM"] == pytest.approx(0.9)
    assert chunked["goodput by vLLM"] == pytest.approx(1.0)
    assert not any(name.startswith("ratio") for row in (chunked, theirs, alone) for name in row)


def test_only_chunks_with_tokens_are_output() -> None:
    now = iter([1.0, 2.0, 3.0])
    record = Record(0, 0, 0, 0.0, 0, 0)
    reader = TokenReader(record, lambda: next(now))
    opening = {"choices": [{"index": 0, "text": "", "prompt_token_ids": [1, 2]}]}
    middle = {"choices": [{"index": 0, "text": "", "token_ids": [7]}]}
    last = {"choices": [{"index": 0, "text": "a", "token_ids": [8, 9], "finish_reason": "stop"}]}
    for event in (opening, middle, last):
        reader.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    reader.end()
    assert record.text == "7,8,9"
    assert list(record.chunk_times) == [2.0, 3.0]
    assert record.token_times() == [2.0, 3.0, 3.0]
    assert (record.finish_reason, record.error, record.output_tokens) == ("stop", "", 2)
