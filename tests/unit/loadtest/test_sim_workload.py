"""What comes into the simulator: lengths, arrivals and prompts are as asked for, and traces are read."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import pytest

from ellm.loadtest.sim.traces import read_trace
from ellm.loadtest.sim.workload import SimRequest, at_rate, make_requests, with_arrivals
from ellm.worker.api.errors import ConfigError

ROOM = 1_000_000  # tokens


def draw(
    count: int = 20_000, seed: int = 0, room: int = ROOM, workload: str = "sharegpt"
) -> list[SimRequest]:
    requests, left_out = make_requests(workload, count, seed, room)
    assert left_out == 0
    return requests


def capped(mean: float, cap: float = 4_000, sigma: float = 0.8) -> float:
    """The mean of min(X, cap) for a lognormal X: 222 and 1,276 tokens."""
    above = (log(cap / mean) + 0.5 * sigma**2) / sigma
    return mean * NormalDist().cdf(above - sigma) + cap * (1 - NormalDist().cdf(above))


def test_lengths_have_the_means_and_the_caps() -> None:
    requests = draw()
    assert fmean(r.prompt_tokens for r in requests) == pytest.approx(capped(222), rel=0.03)
    assert fmean(r.output_tokens for r in requests) == pytest.approx(capped(1_346), rel=0.02)
    assert {r.max_tokens for r in requests} == {4_000}
    assert min(r.output_tokens for r in requests) >= 1
    assert max(r.output_tokens for r in requests) == 4_000


def test_leval_is_cut_to_the_pool() -> None:
    roomy, tight = draw(2_000, workload="leval"), draw(2_000, workload="leval", room=56_112)
    assert fmean(r.prompt_tokens for r in roomy) == pytest.approx(35_956, rel=0.06)
    assert fmean(r.output_tokens for r in roomy) == pytest.approx(5_189, rel=0.06)
    assert max(r.prompt_tokens + r.max_tokens for r in tight) <= 56_112
    assert all(r.output_tokens <= r.max_tokens for r in tight)


def test_a_tiny_pool_has_room_for_every_request() -> None:
    assert max(r.prompt_tokens + r.max_tokens for r in draw(1_000, room=256)) <= 256


@pytest.mark.parametrize("cv", [1.0, 1.7, 4.0])
def test_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    times = [r.arrival_s for r in with_arrivals(draw(), 5.0, cv, seed=3)]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.1)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_equal_gaps() -> None:
    assert [r.arrival_s for r in with_arrivals(draw(4), 2.0, 0.0, seed=0)] == [0.5, 1.0, 1.5, 2.0]


def test_the_seed_says_it_all_and_the_rate_moves_no_length() -> None:
    assert draw(50, seed=1) == draw(50, seed=1) != draw(50, seed=2)
    slow, fast = (with_arrivals(draw(50), rate, 1.7, seed=1) for rate in (1.0, 10.0))
    assert [r.output_tokens for r in slow] == [r.output_tokens for r in fast]
    assert [r.arrival_s for r in slow] == pytest.approx([10 * r.arrival_s for r in fast])


def test_no_prompt_begins_as_another() -> None:
    prompts = [request.prompt_ids(i) for i, request in enumerate(draw(100))]
    assert len({prompt[0] for prompt in prompts}) == 100
    assert [len(prompt) for prompt in prompts] == [r.prompt_tokens for r in draw(100)]


def test_shared_stretches_make_shared_prompts() -> None:
    first, second = (
        SimRequest(0.0, n, 1, 1, ids, 512).prompt_ids(0) for n, ids in ((1200, (7, 8, 9)), (600, (7, 4)))
    )
    assert (len(first), len(second)) == (1200, 600)
    assert first[:512] == second[:512]
    assert first[512] != second[512]


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
"""
BURST = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,,1.5,ChatGPT,472,18,490,Conversation log
45,,1.0,ChatGPT,100,0,100,Conversation log
65,,2.5,GPT-4,1087,230,1317,Conversation log
"""
MOONCAKE = "".join(
    json.dumps({"timestamp": t, "input_length": p, "output_length": o, "hash_ids": h}) + "\n"
    for t, p, o, h in ((0, 600, 5, [0, 1]), (3000, 1100, 7, [0, 2, 3]))
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (AZURE, [(0.0, 374, 44), (4.25, 396, 109)]),
        (BURST, [(0.0, 472, 18), (60.0, 1087, 230)]),  # one without an answer has failed
        (MOONCAKE, [(0.0, 600, 5), (3.0, 1100, 7)]),
    ],
)
def test_traces_are_told_apart_by_their_columns(
    tmp_path: Path, text: str, rows: list[tuple[float, int, int]]
) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    read = read_trace(path)
    assert [(round(r.arrival_s, 6), r.prompt_tokens, r.output_tokens) for r in read] == rows


def test_a_trace_becomes_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(MOONCAKE)
    requests, left_out = make_requests(str(path), 10, 0, ROOM)
    assert left_out == 0
    assert [r.hash_ids for r in requests] == [(0, 1), (0, 2, 3)]
    assert [r.max_tokens for r in requests] == [4_000, 4_000]
    assert [r.arrival_s for r in at_rate(requests, 4.0)] == [0.0, 0.5]
    short, left_out = make_requests(str(path), 10, 0, 1_000)
    assert (len(short), left_out, short[0].max_tokens) == (1, 1, 400)


def test_the_seed_moves_the_window_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        "Timestamp,Request tokens,Response tokens\n" + "".join(f"{i},{i + 1},1\n" for i in range(10))
    )
    windows = [[r.prompt_tokens for r in make_requests(str(path), 4, seed, ROOM)[0]] for seed in (0, 1)]
    assert windows == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert make_requests(str(path), 4, 1, ROOM)[0][0].arrival_s == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        '{"timestamp": 0}\n',
        "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n",
        BURST[:90],
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.csv"):
        read_trace(path)


def test_an_unknown_workload_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="sharegpt, leval"):
        make_requests("sharegtp", 1, 0, ROOM)


def test_a_trace_that_does_not_fit_at_all(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(AZURE)
    with pytest.raises(ConfigError, match="no request fits"):
        make_requests(str(path), 2, 0, 100)
