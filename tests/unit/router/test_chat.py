"""POST /v1/chat/completions: messages to a prompt, and the answer's shapes."""

from __future__ import annotations

from typing import Any

import httpx
from support.events import deltas, stream
from support.router_server import MODEL

from ellm.router.tokenizer import Tokenizer

TEXT = "Say this: äöü 🎉"
MESSAGES = [{"role": "user", "content": TEXT}]


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The worker says the rendered prompt again: special tokens, which are not shown, the last message's
    text, and the end-of-turn token, which ends the answer."""
    response = client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_is_an_assistants_message(client: httpx.Client) -> None:
    answer = chat(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["completion_tokens"] > 4


def test_a_stream_says_the_role_first_and_the_reason_last(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "n": 2, "stream_options": {"include_usage": True}}
    events = stream(client, "/v1/chat/completions", body)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(e["id"], e["created"], e["model"], e["system_fingerprint"]) for e in events}) == 1
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] > 0
    for index in range(2):
        choices = [c for e in events for c in e["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert deltas(events, index) == TEXT


def test_log_probabilities_are_objects(client: httpx.Client) -> None:
    content = chat(client, logprobs=True, top_logprobs=2, seed=1)["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert TEXT.encode() in data
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["logprob"] <= 0 for entry in content)
    events = stream(
        client, "/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "seed": 1}
    )
    streamed = [x for e in events for c in e["choices"] if c["logprobs"] for x in c["logprobs"]["content"]]
    assert streamed == content


def test_log_probabilities_without_a_top(client: httpx.Client) -> None:
    content = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_max_tokens_has_two_names(client: httpx.Client) -> None:
    assert chat(client, max_completion_tokens=4)["usage"]["completion_tokens"] == 4
    assert chat(client, max_tokens=3)["usage"]["completion_tokens"] == 3
    assert chat(client, max_tokens=3, max_completion_tokens=5)["usage"]["completion_tokens"] == 5


def test_without_max_tokens_the_context_is_the_limit(client: httpx.Client) -> None:
    answer = chat(client, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 2048
    assert answer["choices"][0]["finish_reason"] == "length"


def test_content_may_come_in_parts(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert answer["choices"][0]["message"]["content"] == "one\ntwo"


def test_the_final_message_can_be_continued(client: httpx.Client, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
    answer = chat(client, messages=messages, continue_final_message=True, max_tokens=1, return_token_ids=True)
    prompt = tokenizer.decode(answer["choices"][0]["prompt_token_ids"], skip_special_tokens=False)
    assert prompt == "<|bos|><|user|>Hi<|eot|><|assistant|>Hello, I"


def test_a_prompt_is_not_begun_twice(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = chat(client, max_tokens=1, return_token_ids=True)
    ids = answer["choices"][0]["prompt_token_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|bos|><|user|>{TEXT}<|eot|><|assistant|>"


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    answer = chat(
        client, user="someone", metadata={"a": "b"}, store=False, tools=[], tool_choice="none",
        response_format={"type": "text"}, logit_bias=None, stop=None, service_tier="auto", seed=None,
        parallel_tool_calls=True, modalities=["text"], audio=None, top_k=-1, temperature=None,
    )  # fmt: skip
    assert answer["choices"][0]["message"]["content"] == TEXT


def test_a_role_that_the_template_refuses_is_the_clients_error(client: httpx.Client) -> None:
    messages = [{"role": "tool", "content": "x"}]
    response = client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages"
    assert "unknown role: tool" in error["message"]
