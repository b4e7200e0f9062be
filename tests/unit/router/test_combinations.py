"""What goes with what: every pair of features on a model with random weights, whole and as a stream. Each is
honoured or refused by the name that docs/api.md gives."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.checkpoints import write_checkpoint
from support.described import check_answer
from support.events import deltas, read_events
from support.model_server import model_server
from support.tree import ROOT

MESSAGES = [{"role": "user", "content": "Weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


def tools(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, **more}}]


BOTH: dict[str, dict[str, Any]] = {
    "n > 1": {"n": 2},
    "stop": {"stop": ["zq", "\n\n"]},
    "min_tokens": {"min_tokens": 2},
    "ignore_eos": {"ignore_eos": True},
    "penalties, bias": {"presence_penalty": 1.0, "repetition_penalty": 1.1, "logit_bias": {"7": -50}},
    "token ids": {"return_token_ids": True},
    "SLO, pace": {"tpot_slo_ms": 5},
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "completions": (
        "/v1/completions",
        {"prompt": "The weather", "max_tokens": 8, "seed": 3},
        BOTH | {
            "logprobs": {"logprobs": 2}, "echo": {"echo": True}, "prompts": {"prompt": ["a b", "c d"]},
            "grammar": {"guided_choice": ["yes", "no"]},
        },
    ),
    "chats": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 8, "seed": 3},
        BOTH | {
            "logprobs": {"logprobs": True, "top_logprobs": 2}, "grammar": {"response_format": FORM},
            "tools, must": {"tools": tools(), "tool_choice": "required"},
            "tools, strict": {"tools": tools(strict=True)}, "tools, may": {"tools": tools()},
        },
    ),
}  # fmt: skip
ROW = re.compile(
    r"^\| (?P<kind>completions|chats) \| (?P<one>[^|]+) \| (?P<other>[^|]+) \| `(?P<field>\w+)` \|$"
)
ASKS = ("tools, must", "tools, strict", "tools, may")  # of one thing in three ways


def refusals() -> dict[tuple[str, frozenset[str]], str]:
    """As the document has them: (kind, the pair) -> the field that the error names."""
    found = {}
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        row = ROW.match(line)
        if row:
            for one, other in itertools.product(row["one"].split("; "), row["other"].split("; ")):
                found[row["kind"], frozenset((one, other))] = row["field"]
    return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, max_position_embeddings=2048)
    with model_server(folder) as server, httpx.Client(base_url=server.url, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def pairs(kind: str) -> list[tuple[str, str]]:
    features = KINDS[kind][2]
    return [pair for pair in itertools.combinations(features, 2) if not set(pair) <= set(ASKS)]


def test_the_document_names_pairs_that_there_are() -> None:
    known = {(kind, frozenset(pair)) for kind in KINDS for pair in pairs(kind)}
    assert refusals()
    assert set(refusals()) <= known


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_honoured_or_refused_by_name(
    client: httpx.Client, document: dict[str, Any], kind: str
) -> None:
    path, base, features = KINDS[kind]
    expected = refusals()
    for pair in pairs(kind):
        body = base | features[pair[0]] | features[pair[1]]
        whole = client.post(path, json=body)
        _, status = check_answer(document, whole)
        field = expected.get((kind, frozenset(pair)))
        if field is not None:
            assert status == 400, pair
            assert whole.json()["error"]["param"] == field, pair
            continue
        assert status == 200, (pair, whole.text)
        pace = {"stream_pace": True} if "SLO, pace" in pair else {}
        streamed = client.post(path, json=body | {"stream": True} | pace)
        assert streamed.status_code == 200, pair
        compare(whole.json()["choices"], read_events(streamed), pair)


def compare(choices: list[dict[str, Any]], events: list[dict[str, Any]], pair: tuple[str, str]) -> None:
    """A stream says what the whole answer says."""
    for choice in choices:
        index = choice["index"]
        last = [c for event in events for c in event["choices"] if c["index"] == index][-1]
        assert last["finish_reason"] == choice["finish_reason"], pair
        if "text" in choice:
            assert deltas(events, index) == choice["text"], pair
            continue
        message = choice["message"]
        assert deltas(events, index) == (message["content"] or ""), pair
        parts = [
            part["function"]["arguments"]
            for event in events
            for c in event["choices"]
            if c["index"] == index
            for part in c["delta"].get("tool_calls", ())
        ]
        calls = message.get("tool_calls", ())
        assert "".join(parts) == "".join(call["function"]["arguments"] for call in calls), pair
