"""Whether what a server answers is what its OpenAPI document says."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from jsonschema import Draft202012Validator

Document = dict[str, Any]


def operation(document: Document, method: str, url_path: str) -> tuple[str, dict[str, Any]]:
    """The path as the document writes it, and what it says of the call."""
    for path, methods in document["paths"].items():
        if re.fullmatch(re.sub(r"\\?\{\w+\\?\}", ".+", re.escape(path)), url_path):
            return path, methods[method.lower()]
    raise AssertionError(f"{url_path} is not described")


def check_answer(document: Document, answer: httpx.Response) -> tuple[str, int]:
    """Its status, headers, content type and body are all described. Returns the path and the status."""
    request = answer.request
    path, described = operation(document, request.method, request.url.path)
    assert str(answer.status_code) in described["responses"], f"{path}: {answer.status_code} {answer.text}"
    response = described["responses"][str(answer.status_code)]
    for name, header in response["headers"].items():
        assert name in answer.headers or not header["required"], f"{path} {answer.status_code}: no {name}"
        if name in answer.headers:
            validate(document, header["schema"], answer.headers[name])
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in response["content"], f"{path} {answer.status_code}: {kind}"
    schema = response["content"][kind]["schema"]
    if kind == "application/json":
        validate(document, schema, answer.json())
    elif kind == "text/event-stream":
        check_events(document, schema, answer.text)
    return path, answer.status_code


def check_events(document: Document, schema: dict[str, Any], text: str) -> None:
    *events, last, rest = (event.removeprefix("data: ") for event in text.split("\n\n"))
    done, content = schema["properties"]["data"]["anyOf"]
    assert events
    assert (last, rest) == (done["const"], "")
    validate(document, {"type": "array", "items": content["contentSchema"]}, [*map(json.loads, events)])


def validate(document: Document, schema: dict[str, Any], value: Any) -> None:
    """Raises jsonschema.ValidationError."""
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def accepts(document: Document, name: str, value: Any) -> bool:
    """Whether a body is one of the named schema."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return bool(Draft202012Validator(schema).is_valid(value))
