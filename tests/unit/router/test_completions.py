"""POST /v1/completions: shapes, prompts, stops, echo and log-probabilities."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from support.events import deltas, stream
from support.router_server import MODEL, RouterServer

from ellm.router.tokenizer import Tokenizer

TEXT = "The quick brown fox, 你好 🎉 jumps."


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[int]:
    """The worker says its prompt again, so this is what comes."""
    return tokenizer.encode(TEXT, add_special_tokens=False)


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": MODEL, "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_has_all_that_openai_promises(client: httpx.Client, ids: list[int]) -> None:
    answer = complete(client, prompt=ids)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL
    assert isinstance(answer["created"], int)
    assert answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    usage = answer["usage"]
    # The end-of-text token was generated, and counts.
    assert usage["completion_tokens"] == len(ids) + 1
    assert usage["prompt_tokens"] == len(ids)
    assert usage["total_tokens"] == 2 * len(ids) + 1
    assert usage["prompt_tokens_details"]["cached_tokens"] in range(len(ids) + 1)


def test_a_stream_says_the_same_in_pieces(client: httpx.Client, ids: list[int]) -> None:
    events = stream(client, "/v1/completions", {"prompt": ids, "max_tokens": 100})
    assert deltas(events) == TEXT
    assert (
        len({(e["id"], e["created"], e["model"], e["object"], e["system_fingerprint"]) for e in events}) == 1
    )
    reasons = [e["choices"][0]["finish_reason"] for e in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]
    assert all("usage" not in e for e in events)
    # One event per token that completes a character; none is empty but the last.
    assert all(e["choices"][0]["text"] for e in events[:-1])
    assert not any("\ufffd" in e["choices"][0]["text"] for e in events)


def test_usage_comes_last_when_asked_for(client: httpx.Client, ids: list[int]) -> None:
    body = {"prompt": ids, "max_tokens": 5, "stream_options": {"include_usage": True}}
    events = stream(client, "/v1/completions", body)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_usage_comes_with_every_chunk_when_asked_for(client: httpx.Client, ids: list[int]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(client, "/v1/completions", {"prompt": ids, "max_tokens": 4, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("streamed", [False, True])
def test_several_prompts_and_choices_are_told_apart(
    client: httpx.Client, tokenizer: Tokenizer, streamed: bool
) -> None:
    texts = ["one two", "drei vier fünf"]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    body = {"prompt": prompts, "n": 2, "max_tokens": 50}
    if streamed:
        events = stream(client, "/v1/completions", body)
        found = [deltas(events, index) for index in range(4)]
        reasons = [c["index"] for e in events for c in e["choices"] if c["finish_reason"] == "stop"]
        assert sorted(reasons) == [0, 1, 2, 3]
    else:
        answer = complete(client, **body)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        found = [choice["text"] for choice in answer["choices"]]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert answer["usage"]["completion_tokens"] == 2 * (sum(map(len, prompts)) + 2)
    assert found == [texts[0], texts[0], texts[1], texts[1]]


def test_prompts_are_texts_too(client: httpx.Client) -> None:
    answer = complete(client, prompt=["one", "two"])
    assert [choice["text"] for choice in answer["choices"]] == ["one", "two"]
    assert complete(client, prompt="three")["choices"][0]["text"] == "three"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        (" fox", False, "The quick brown"),
        (" fox", True, "The quick brown fox"),
        (["nothing", "brown f"], False, "The quick "),
        ("o", False, "The quick br"),
        ("jumps.!", False, TEXT),
        ("好 🎉", False, "The quick brown fox, 你"),
    ],
)
def test_stop_strings_end_the_text(
    client: httpx.Client, ids: list[int], stop: Any, include: bool, text: str, streamed: bool
) -> None:
    body = {"prompt": ids, "max_tokens": 100, "stop": stop, "include_stop_str_in_output": include}
    if streamed:
        events = stream(client, "/v1/completions", body)
        assert deltas(events) == text
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = complete(client, **body)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_a_stop_string_frees_the_worker_at_once(
    client: httpx.Client, server: RouterServer, ids: list[int]
) -> None:
    answer = complete(client, prompt=ids, stop="quick", ignore_eos=True, max_tokens=1000)
    assert answer["usage"]["completion_tokens"] < len(ids)
    worker = server.workers[0]
    for _ in range(100):
        if not server.on_loop(lambda: worker.front.num_live):
            break
    assert server.on_loop(lambda: worker.front.num_live) == 0


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(client: httpx.Client, ids: list[int]) -> None:
    choice = complete(client, prompt=ids, stop_token_ids=[ids[3]])["choices"][0]
    assert TEXT.startswith(choice["text"])
    assert choice["finish_reason"] == "stop"
    shown = complete(client, prompt=ids, stop_token_ids=[ids[3]], include_stop_str_in_output=True)
    assert len(shown["choices"][0]["text"]) > len(choice["text"])


def test_min_tokens_hold_stop_strings_off(client: httpx.Client, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("a b a b a b", add_special_tokens=False)
    early = complete(client, prompt=prompt, stop="b")["choices"][0]["text"]
    late = complete(client, prompt=prompt, stop="b", min_tokens=4)["choices"][0]["text"]
    assert early == "a "
    assert len(late) > len(early)
    assert "b" in late


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_line_up_with_the_text(
    client: httpx.Client, tokenizer: Tokenizer, ids: list[int], streamed: bool
) -> None:
    body = {"prompt": ids, "max_tokens": 100, "logprobs": 2}
    if streamed:
        events = stream(client, "/v1/completions", body)
        parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
        found: dict[str, list[Any]] = {key: [x for p in parts for x in p[key]] for key in parts[0]}
    else:
        found = complete(client, **body)["choices"][0]["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(values) for values in found.values()}) == 1
    assert len(found["tokens"]) == len(ids) + 1
    for token_id, token, logprob, top in zip(
        ids, found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=False
    ):
        data = tokenizer.token_bytes(token_id)
        assert token == "bytes:" + "".join(f"\\x{b:02x}" for b in data) or token == data.decode()
        assert top[token] == logprob
        assert len(top) in (2, 3)
    whole = [(t, o) for t, o in zip(found["tokens"], found["text_offset"], strict=True) if t[:6] != "bytes:"]
    assert all(TEXT[offset:].startswith(token) for token, offset in whole[:-1])


def test_log_probabilities_end_with_the_text(client: httpx.Client, ids: list[int]) -> None:
    choice = complete(client, prompt=ids, logprobs=0, stop="brown")["choices"][0]
    assert choice["text"] == "The quick "
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_echo_scores_the_prompt(
    client: httpx.Client, ids: list[int], max_tokens: int, streamed: bool
) -> None:
    """As lm-eval asks: ids in, prompt and log-probabilities out, the first token without one."""
    body = {"prompt": ids, "echo": True, "max_tokens": max_tokens, "logprobs": 1, "temperature": 0}
    if streamed:
        events = stream(client, "/v1/completions", body)
        text = deltas(events)
        parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
        found: dict[str, list[Any]] = {key: [x for p in parts for x in p[key]] for key in parts[0]}
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    else:
        answer = complete(client, **body)
        text, found = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens
    assert text.startswith(TEXT)
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(isinstance(value, float) for value in found["token_logprobs"][1:])
    assert found["text_offset"] == sorted(found["text_offset"])
    assert all(offset >= len(TEXT) for offset in found["text_offset"][len(ids) :])
    assert all(offset < len(TEXT) for offset in found["text_offset"][: len(ids)])


def test_echo_alone_gives_the_prompt_as_it_was_sent(client: httpx.Client) -> None:
    choice = complete(client, prompt="Say  this", echo=True, max_tokens=0)["choices"][0]
    assert choice["text"] == "Say  this"
    assert choice["logprobs"] is None


def test_token_ids_come_back_when_asked_for(client: httpx.Client, ids: list[int]) -> None:
    choice = complete(client, prompt=ids, return_token_ids=True, max_tokens=6)["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == ids[:6]
    events = stream(client, "/v1/completions", {"prompt": ids, "return_token_ids": True, "max_tokens": 9})
    assert events[0]["choices"][0]["prompt_token_ids"] == ids
    assert [i for e in events for i in e["choices"][0].get("token_ids", [])] == ids[:9]


def test_ignore_eos_goes_on_to_max_tokens(client: httpx.Client, ids: list[int]) -> None:
    answer = complete(client, prompt=ids, ignore_eos=True, max_tokens=3 * len(ids))
    assert answer["choices"][0]["text"] == 3 * TEXT
    assert answer["choices"][0]["finish_reason"] == "length"


def test_sixteen_tokens_are_the_default(client: httpx.Client, ids: list[int]) -> None:
    response = client.post("/v1/completions", json={"prompt": ids, "ignore_eos": True})
    assert response.json()["usage"]["completion_tokens"] == 16


def test_a_cached_prefix_is_reported(client: httpx.Client, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("A prefix of its own. " * 20, add_special_tokens=False)
    complete(client, prompt=prompt, max_tokens=1)
    again = complete(client, prompt=prompt, max_tokens=1)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert len(prompt) - 16 <= cached + 16 <= len(prompt) + 16
    assert cached > 0
    salted = complete(client, prompt=prompt, max_tokens=1, cache_salt="another tenant")
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
