"""What `ellm bench` will send is what was asked for: rhythm, lengths, shared prefixes, conversations."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from support.tree import ROOT

from ellm.loadtest.generator.arrivals import arrival_times, stretched
from ellm.loadtest.generator.content import (
    FIRST_ID,
    LAST_ID,
    Prompt,
    PromptWriter,
    Scale,
    Stretch,
    single_token_words,
)
from ellm.loadtest.generator.lengths import parse_lengths
from ellm.loadtest.generator.options import Options, Slo
from ellm.loadtest.generator.plan import make_plan
from ellm.worker.api.errors import ConfigError

URL = "http://127.0.0.1:1"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{40 + i}.5000000,{100 + i},{10 + i}\n" for i in range(8)
)


def options(**changes: object) -> Options:
    return Options(**{"url": URL, "rate": 10.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "cv"), [("poisson", 1.0), ("gamma", 2.0), ("gamma", 0.5), ("constant", 0.0)]
)
def test_gaps_have_the_mean_and_the_variation(kind: str, cv: float) -> None:
    times = arrival_times(kind, 5.0, 20_000, random.Random(1), cv=cv)
    gaps = [b - a for a, b in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_bursts_come_together_at_the_rate() -> None:
    times = arrival_times("bursts", 10.0, 8_000, random.Random(1), size=4)
    assert all(len(set(times[i : i + 4])) == 1 for i in range(0, 8_000, 4))
    assert len(set(times)) == 2_000
    assert 8_000 / times[-1] == pytest.approx(10.0, rel=0.1)


def test_a_trace_keeps_its_rhythm_at_another_rate() -> None:
    assert stretched([0.0, 1.0, 4.0], None) == [0.0, 1.0, 4.0]
    assert stretched([0.0, 1.0, 4.0], 3.0) == pytest.approx([0.0, 0.25, 1.0])
    assert arrival_times("poisson", float("inf"), 3, random.Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("64", 64, 64, 64),
        ("10-20", 15, 10, 20),
        ("normal:256,16", 256, 150, 360),
        ("lognormal:256,0.5", 256, 1, 10_000),
        ("exponential:100", 100, 1, 5_000),
        ("choice:8,24", 16, 8, 24),
    ],
)
def test_lengths_are_drawn_as_named(text: str, mean: float, low: int, high: int) -> None:
    rng = random.Random(3)
    drawn = [parse_lengths(text, "--input-tokens").draw(rng) for _ in range(10_000)]
    assert fmean(drawn) == pytest.approx(mean, rel=0.04)
    assert low <= min(drawn)
    assert max(drawn) <= high


@pytest.mark.parametrize("text", ["", "0", "20-10", "normal:5", "normal:a,b", "gauss:1,2", "choice:", "-4"])
def test_lengths_that_make_no_sense_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-tokens"):
        parse_lengths(text, "--input-tokens")


def test_the_same_seed_gives_the_same_requests_at_any_rate() -> None:
    slow, fast = (make_plan(options(rate=rate, num_requests=50, turns="1-3")) for rate in (1.0, 10.0))
    assert [s.turns for s in slow] == [s.turns for s in fast]
    assert [s.due_s for s in slow] == pytest.approx([10 * s.due_s for s in fast])
    other = make_plan(options(num_requests=50, turns="1-3", seed=1))
    assert [s.turns for s in other] != [s.turns for s in fast]


def test_conversations_think_and_some_clients_leave() -> None:
    plan = make_plan(options(num_requests=400, turns="3", think_s=2.0, cancel_share=0.25, warmup=10))
    turns = [turn for session in plan for turn in session.turns]
    assert len(plan) == 410
    assert sum(session.warmup for session in plan) == 10
    assert [turn.index for turn in turns] == list(range(1_230))
    assert all(session.turns[0].think_s == 0.0 for session in plan)
    assert fmean(t.think_s for s in plan for t in s.turns[1:]) == pytest.approx(2.0, rel=0.15)
    assert fmean(t.cancel_after_s is not None for t in turns) == pytest.approx(0.25, abs=0.05)


def test_system_prompts_are_shared_word_for_word() -> None:
    plan = make_plan(options(num_requests=40, input_tokens="20", shared_prompts=2, shared_tokens=50))
    writer = PromptWriter(Scale())
    parts = [writer.parts(session.turns[0].prompt) for session in plan]
    assert len({system for system, _ in parts}) == 2
    assert len({user for _, user in parts}) == 40
    assert all(len(system.split()) == 50 and len(user.split()) == 20 for system, user in parts)


def test_prompts_hit_their_length_where_words_are_not_tokens() -> None:
    scale = Scale.fitted((16, 144), (29, 221))  # one and a half tokens a word, and five around them
    assert scale == Scale(1.5, 5.0)
    prompt = Prompt(305, (Stretch("a", 100), Stretch("b", 205)))
    assert len(PromptWriter(scale).text(prompt).split()) * 1.5 + 5 == pytest.approx(305, abs=2)
    assert Scale.fitted((16, 144), (0, 0)) == Scale()


def test_ids_are_exact_and_follow_from_the_key() -> None:
    shared = Stretch("s", 32)
    one, other = (PromptWriter.ids(Prompt(40, (shared, Stretch(key, 8)))) for key in "ab")
    assert len(one) == len(other) == 40
    assert one[:32] == other[:32]
    assert one[32:] != other[32:]
    assert all(FIRST_ID <= id_ < LAST_ID for id_ in one)


def test_words_of_the_shipped_tokenizer_are_one_token_each() -> None:
    from tokenizers import Tokenizer

    folder = ROOT / "deploy" / "bundled" / "pydoc-5m"
    words, begins = single_token_words(str(folder))
    text = PromptWriter(Scale(1.0, begins), words).text(Prompt(200, (Stretch("k", 200),)))
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids) == 200


def test_hash_ids_become_prefixes_that_are_really_shared(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1_300, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 500, "input_length": 1_500, "output_length": 6, "hash_ids": [0, 1, 3]},
        {"timestamp": 1_000, "input_length": 700, "output_length": 7, "hash_ids": [0, 9]},
    ]
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    plan = make_plan(options(rate=None, trace=str(path), arrivals="trace", num_requests=3))
    assert [s.due_s for s in plan] == [0.0, 0.5, 1.0]
    assert [s.turns[0].output_tokens for s in plan] == [5, 6, 7]
    a, b, c = (PromptWriter.ids(session.turns[0].prompt) for session in plan)
    assert (len(a), len(b), len(c)) == (1_300, 1_500, 700)
    assert a[:1024] == b[:1024]
    assert a[1024:] != b[1024:1300]
    assert a[:512] == c[:512]
    assert a[512:700] != c[512:]
    texts = [PromptWriter(Scale()).text(session.turns[0].prompt).split() for session in plan]
    assert texts[0][:1024] == texts[1][:1024]


def test_a_trace_is_scaled_and_its_rate_set(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    plan = make_plan(options(rate=2.0, trace=str(path), arrivals="trace", num_requests=8, trace_scale=0.1))
    assert [s.turns[0].prompt.tokens for s in plan] == [round(0.1 * (100 + i)) for i in range(8)]
    assert plan[-1].due_s == pytest.approx(4.0)
    poisson = make_plan(options(rate=2.0, trace=str(path), arrivals="poisson", num_requests=8))
    gaps = {round(b.due_s - a.due_s, 6) for a, b in pairwise(poisson)}
    assert len(gaps) == 7


def test_a_trace_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,4\n")
    with pytest.raises(ConfigError, match="GeneratedTokens"):
        make_plan(options(rate=None, trace=str(path), arrivals="trace", num_requests=1))
    path.write_text(AZURE)
    with pytest.raises(ConfigError, match="holds 8 requests; 9 were asked for"):
        make_plan(options(rate=None, trace=str(path), arrivals="trace", num_requests=9))


def test_datasets_in_three_forms(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    said = [
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "x" * 40},
        {"from": "human", "value": "b"},
    ]
    path.write_text(json.dumps([{"conversations": said}]))
    (session,) = make_plan(options(dataset=str(path), num_requests=1, turns="5"))
    assert [turn.prompt.text for turn in session.turns] == ["hello", "b"]
    assert [turn.output_tokens for turn in session.turns] == [10, 128]
    lines = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]},
        {"prompt": "p", "output_tokens": 7},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    plan = make_plan(options(dataset=str(path), num_requests=4))
    assert sorted({str(s.turns[0].prompt.text) for s in plan}) == ["S\nq", "p"]
    assert {s.turns[0].output_tokens for s in plan} == {128, 7}
    path.write_text('[{"question": "?"}]')
    with pytest.raises(ConfigError, match="neither conversations, messages nor prompt"):
        make_plan(options(dataset=str(path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "--rate must be above 0"),
        ({"rate": -1.0}, "--rate must be above 0"),
        ({"rate": float("nan")}, "--rate must be above 0"),
        ({"rate": None}, "needs --rate"),
        ({"num_requests": 0}, "--num-requests"),
        ({"arrivals": "trace"}, "needs --trace"),
        ({"arrivals": "gamma", "cv": 0.0}, "--cv"),
        ({"prompt_ids": True, "chat": True}, "--chat"),
        ({"prompt_ids": True, "turns": "2"}, "earlier turns"),
        ({"shared_prompts": 2}, "--shared-tokens"),
        ({"cancel_share": 1.5}, "--cancel"),
        ({"trace": "a", "dataset": "b"}, "not both"),
        ({"slo": Slo(ttft_s=0.0)}, "SLO"),
        ({"trace": "missing.csv"}, "cannot read missing.csv"),
        ({"dataset": "missing.json"}, "cannot read missing.json"),
    ],
)
def test_what_cannot_run_is_said_before_it_runs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(options(**changes))
