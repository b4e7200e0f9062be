"""`ellm generate` on the model that ships: the engine without Ray, from the command line to the text."""

from __future__ import annotations

import io
import json
import multiprocessing
from typing import Any

import pytest

from ellm.deploy import cli

PROMPTS = ["The list method append", "Return the absolute value of", "é"]
FLAGS = ["--max-tokens", "12", "--kv-blocks", "64", "--threads", "1", "--device", "cpu"]
# A small largest step: the engine runs it once at its start.
FLAGS += ["--set", "worker.scheduler.max_step_tokens=64", "--set", "worker.scheduler.max_num_seqs=8"]


def generate(capsys: pytest.CaptureFixture[str], *words: str, prompts: list[str] = PROMPTS) -> list[Any]:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert cli.main(["generate", *asked, *FLAGS, "--json", *words]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts_come_back_in_order_and_as_they_would_alone(capsys: pytest.CaptureFixture[str]) -> None:
    together = generate(capsys)
    assert [found["prompt"] for found in together] == PROMPTS
    assert all(found["num_tokens"] == 12 or found["finish_reason"] == "stop" for found in together)
    assert all(found["text"] for found in together)
    assert generate(capsys, prompts=PROMPTS[1:2]) == together[1:2]


def test_a_stop_string_ends_the_text_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = generate(capsys, prompts=PROMPTS[:1])
    stop = whole["text"][6:9]
    (cut,) = generate(capsys, "--stop", stop, prompts=PROMPTS[:1])
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_plain_text_streams_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = generate(capsys, prompts=PROMPTS[:1])
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[0]))
    assert cli.main(["generate", *FLAGS, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out == whole["text"] + "\n"
    assert "tokens/s" in captured.err


def test_seeds_repeat_and_differ(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "1", "--top-p", "0.9", "--seed"]
    first, again, other = (generate(capsys, *flags, seed, prompts=PROMPTS[:1]) for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_a_chat_goes_through_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    (plain,) = generate(capsys, prompts=["What is a list?"])
    (chat,) = generate(capsys, "--chat", prompts=["What is a list?"])
    assert chat["num_prompt_tokens"] > plain["num_prompt_tokens"]


def test_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--prompt", "x", *FLAGS, "--top-p", "2"]) == 1
    assert capsys.readouterr().err == "ellm generate: top_p must be in (0, 1]\n"


def test_two_ranks_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["--temperature", "1", "--seed", "3"]
    assert generate(capsys, "--tp", "2", *drawn) == generate(capsys, *drawn)
    assert not multiprocessing.active_children()
