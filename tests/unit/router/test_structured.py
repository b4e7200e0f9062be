"""Structured output over HTTP, on a model with random weights: what comes back is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from support.checkpoints import write_checkpoint
from support.events import deltas, stream
from support.model_server import NAME, model_server

MESSAGES = [{"role": "user", "content": "Say something."}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": ""},  # random weights like blanks
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "y": {"const": 3}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, max_position_embeddings=1024)
    with model_server(folder) as server, httpx.Client(base_url=server.url, timeout=120) as open_client:
        yield open_client


def asked(schema: Any, **more: Any) -> dict[str, Any]:
    spec = {"name": "answer", "schema": schema, "strict": True}
    return {
        "messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": spec}, **more
    }  # fmt: skip


def post(client: httpx.Client, body: dict[str, Any], path: str = "chat/completions") -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json={"model": NAME, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(client: httpx.Client, body: dict[str, Any], path: str = "chat/completions") -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json={"model": NAME, **body})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.5, "seed": 7, "top_p": 0.9}])
def test_every_choice_is_of_the_schema(client: httpx.Client, settings: dict[str, Any]) -> None:
    body = asked(PERSON, n=2, max_tokens=400, **settings)
    answer = post(client, body)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "stop"], texts
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    streamed = stream(client, "/v1/chat/completions", body)
    assert [deltas(streamed, i) for i in range(2)] == texts or "seed" not in settings
    for i in range(2):
        jsonschema.validate(json.loads(deltas(streamed, i)), PERSON)


def test_constrained_and_free_requests_share_steps(client: httpx.Client) -> None:
    """And a constrained one scores its tokens by the model's own distribution."""
    body = {"prompt": ["one", "two"], "max_tokens": 5, "temperature": 0, "logprobs": 1}
    free = post(client, body, "completions")
    held = post(client, body | {"structured_outputs": {"choice": ["maybe", "möglich"]}}, "completions")
    assert free == post(client, body, "completions") | {k: free[k] for k in ("id", "created")}
    for choice in held["choices"]:
        assert "maybe".startswith(choice["text"]) or "möglich".startswith(choice["text"])
        assert all(p < 0 for p in choice["logprobs"]["token_logprobs"])


def test_an_echo_is_not_constrained(client: httpx.Client) -> None:
    """Nor is it of the grammar; its tokens are scored like any prompt's."""
    body = {"prompt": "go: ", "echo": True, "logprobs": 2, "seed": 1, "guided_choice": ["stop", "start"]}
    (choice,) = post(client, body, "completions")["choices"]
    assert choice["text"] in ("go: stop", "go: start")
    assert choice["finish_reason"] == "stop"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert all(p <= 0 for p in logprobs["token_logprobs"][1:])
    assert "".join(logprobs["tokens"]).startswith(choice["text"])
    events = stream(client, "/v1/completions", body)
    assert "".join(c["text"] for e in events for c in e["choices"]) == choice["text"]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]{2}"}}, "[ab]{3}-[0-9]{2}"),
        ({"guided_regex": "x+y"}, "x+y"),
        ({"guided_choice": ["yes", 'no "way"']}, 'yes|no "way"'),
        ({"structured_outputs": {"grammar": 'start: "a" (b | "c"){1,3}\nb: "bb"'}}, "a(bb|c){1,3}"),
        ({"guided_json": {"enum": [1, "two", None]}}, '1|"two"|null'),
        ({"structured_outputs": {"json": json.dumps({"type": "boolean"})}}, "true|false"),
    ],
)
def test_other_forms(client: httpx.Client, fields: dict[str, Any], form: str) -> None:
    (choice,) = post(client, {"prompt": "go", "max_tokens": 300, "seed": 3, **fields}, "completions")[
        "choices"
    ]
    assert re.fullmatch(form, choice["text"]), choice
    assert choice["finish_reason"] == "stop"


def test_a_format_that_nobody_has_defined_says_nothing(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "color", "maxLength": 3}},
        "required": ["format"], "additionalProperties": False, "x-guidance": {"whitespace_pattern": ""},
    }  # fmt: skip
    answer = post(client, asked(schema, max_tokens=60))
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)
    regex = {"type": "string", "format": "idn-email"}
    assert "idn-email" in refused(client, asked(regex))["message"]


def test_any_object(client: httpx.Client) -> None:
    """Random weights write endlessly: up to its limit it is the beginning of an object."""
    answer = post(
        client, {"messages": MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 40}
    )
    assert answer["choices"][0]["message"]["content"].startswith("{")


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HUGE = {"enum": ["x" * 1000 + str(i) for i in range(2000)]}
BAD: list[tuple[dict[str, Any], str, str]] = [
    (asked({"type": "integer", "minimum": 5, "maximum": 3}), "json_schema.schema", "greater than maximum"),
    (asked({"allOf": [{"type": "string"}, {"type": "null"}]}), "json_schema.schema", "Unsatisfiable"),
    (asked({"type": "array", "uniqueItems": True}), "json_schema.schema", "uniqueItems"),
    (asked({"type": "string", "pattern": "(?<x"}), "json_schema.schema", "regex"),
    (asked(7), "json_schema.schema", "object"),
    (asked("{"), "json_schema.schema", "not JSON"),
    (asked(nested(200)), "json_schema.schema", ""),
    (asked(nested(300)), "json_schema.schema", "deep"),
    (asked(HUGE), "json_schema.schema", "bytes"),
    (asked(PERSON, min_tokens=4), "min_tokens", "go with"),
    (asked(PERSON, ignore_eos=True), "ignore_eos", "go with"),
    (asked(PERSON, guided_regex="a"), "guided_regex", "exclude"),
    ({"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format.type", "one of"),
    ({"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "format.json_schema", "name"),
    (
        {"messages": MESSAGES, "response_format": {"type": "json_object", "schema": {}}},
        "response_format.schema", "not a field",
    ),
    ({"messages": MESSAGES, "guided_regex": "(a"}, "guided_regex", "unclosed"),
    ({"messages": MESSAGES, "guided_regex": "a(?=b)"}, "guided_regex", "look-around"),
    ({"messages": MESSAGES, "guided_grammar": "start: nothing"}, "guided_grammar", "unknown name"),
    ({"messages": MESSAGES, "guided_grammar": 'start: "a" start'}, "guided_grammar", "Too many items"),
    ({"messages": MESSAGES, "guided_choice": []}, "guided_choice", "none empty"),
    ({"messages": MESSAGES, "structured_outputs": {}}, "structured_outputs", "one of"),
    ({"messages": MESSAGES, "structured_outputs": {"xml": "a"}}, "structured_outputs.xml", "not a field"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field", "reason"), BAD, ids=[f"{b[1]}-{i}" for i, b in enumerate(BAD)])
def test_what_cannot_be_met_is_refused_by_name(
    client: httpx.Client, body: dict[str, Any], field: str, reason: str
) -> None:
    error = refused(client, body)
    assert error["param"].endswith(field), error
    assert reason in error["message"], error
    assert len(error["message"]) < 600


EXPLOSIVE = ["((a{1,1000}){1,1000}){1,1000}", "(.*a.{200}|.*b.{300}){50}", "(a|aa)*.{0,50000}x", "(x+x+)+y"]


@pytest.mark.parametrize("regex", EXPLOSIVE)
def test_an_explosive_regex_ends_within_its_limits(client: httpx.Client, regex: str) -> None:
    """Refused, or obeyed until it grows beyond the limit of one sequence: a typed error for it alone."""
    response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 90, "guided_regex": regex})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert post(client, {"prompt": "a", "max_tokens": 1}, "completions")["choices"]
