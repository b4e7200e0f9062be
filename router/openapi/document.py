"""The OpenAPI document of one router: which endpoints it has, and what each takes and answers.

Made when it is asked for, with the limits of the config and what is known of the models. An endpoint is in it
if the application has it; one that the application has and this table lacks fails a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ellm.router.openapi import answers, requests
from ellm.router.openapi.json_types import TEXT, Schema, ref
from ellm.router.openapi.requests import Bounds

JSON = "application/json"
EVENTS = "text/event-stream"
HTML = "text/html"
PLAIN = "text/plain"

# status -> what it means; each has an Error as its body.
REFUSALS = {
    400: "A field cannot be honoured (`param` names it), or the body is no JSON object.",
    401: "A key is needed, or the one given is not known.",
    403: "No key that the server has opens this.",
    404: "There is no such thing, or not for this key.",
    408: "The request's deadline passed, or its body did not come in time.",
    413: "The body is larger than the server's limit.",
    429: "A queue is full, or the key's rate is used up.",
    431: "More headers, or longer ones, than a request needs.",
    500: "A fault of the server; nothing is said of what is inside.",
    503: "Nothing can serve this now.",
}
GENERATION = (400, 401, 403, 404, 408, 413, 429, 431, 500, 503)
TEXT_CALL = GENERATION
READ = (401, 403, 431, 500)
OPEN, KEY, ADMIN = "open", "key", "admin"  # who may call


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one status: the content types, each with its schema."""

    what: str
    content: Mapping[str, Schema]


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    summary: str
    answers: Mapping[int, Answer]
    refusals: tuple[int, ...] = READ
    access: str = KEY
    tag: str = "operations"
    body: str | None = None  # of components/schemas
    parameters: tuple[Schema, ...] = field(default=())


def _ok(schema: str, what: str = "As asked.") -> dict[int, Answer]:
    return {200: Answer(what, {JSON: ref(schema)})}


def _generated(whole: str, chunk: str) -> dict[int, Answer]:
    content = {JSON: ref(whole), EVENTS: answers.events(chunk)}
    return {200: Answer("The answer; with `stream: true` as events.", content)}


def _header(name: str, what: str, schema: Schema = TEXT) -> Schema:
    return {"name": name, "in": "header", "required": False, "description": what, "schema": schema}


_ID = {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"}
REQUEST_ID = _header("X-Request-Id", "Comes back in the answer and stands in the server's log.", _ID)
OF_GENERATION = (
    REQUEST_ID,
    _header("X-Session-Id", "Requests of one session prefer one worker.", _ID),
    *(
        _header(f"X-Ellm-{name}", "The field of this name, where the body has none.", ref(name))
        for name in requests.HEADERS
    ),
)
MODEL_ID: Schema = {"name": "model_id", "in": "path", "required": True, "schema": TEXT}
_REQUEST: Schema = {"name": "request_id", "in": "path", "required": True, "schema": TEXT}
_ANY_OBJECT = {200: Answer("As asked.", {JSON: {"type": "object"}})}
_PAGE = {200: Answer("A page for people.", {HTML: TEXT})}
_FILES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}  # of the page at /

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/completions": Endpoint(
        "post", "Continue prompts.", _generated("Completion", "CompletionChunk"), GENERATION,
        tag="generation", body="CompletionRequest", parameters=OF_GENERATION,
    ),
    "/v1/chat/completions": Endpoint(
        "post", "Answer a conversation.", _generated("ChatCompletion", "ChatCompletionChunk"), GENERATION,
        tag="generation", body="ChatRequest", parameters=OF_GENERATION,
    ),
    "/v1/models": Endpoint("get", "The models.", _ok("ModelList"), tag="models"),
    "/v1/models/{model_id}": Endpoint(
        "get", "One model.", _ok("Model"), (*READ, 404, 503), tag="models", parameters=(MODEL_ID,)
    ),
    "/tokenize": Endpoint(
        "post", "A text or a conversation as token ids.", _ok("Tokens"), TEXT_CALL, tag="tokens",
        body="TokenizeRequest",
    ),
    "/detokenize": Endpoint(
        "post", "Token ids as a text.", _ok("Text"), TEXT_CALL, tag="tokens", body="DetokenizeRequest"
    ),
    "/health": Endpoint(
        "get", "The process and a worker are alive.",
        {200: Answer("It is.", {JSON: ref("Health")}), 503: Answer("All are gone.", {JSON: ref("Health")})},
        (431, 500), OPEN,
    ),
    "/health/ready": Endpoint(
        "get", "A worker takes requests and makes progress.",
        {200: Answer("Ready.", {JSON: ref("Readiness")}), 503: Answer("Not now.", {JSON: ref("Readiness")})},
        (431, 500), OPEN,
    ),
    "/version": Endpoint("get", "The release.", _ok("Version")),
    "/metrics": Endpoint(
        "get", "Counters and gauges, as Prometheus reads them.", {200: Answer("The page.", {PLAIN: TEXT})},
        access=ADMIN,
    ),
    "/admin/workers": Endpoint("get", "The workers and their load.", _ok("Workers"), access=ADMIN),
    "/admin/cluster": Endpoint("get", "The cluster at a glance.", _ANY_OBJECT, access=ADMIN, tag="page"),
    "/admin/requests": Endpoint("get", "The latest requests.", _ANY_OBJECT, access=ADMIN, tag="page"),
    "/admin/requests/{request_id}": Endpoint(
        "get", "What became of a request.", _ANY_OBJECT, (*READ, 404), ADMIN, tag="page",
        parameters=(_REQUEST,),
    ),
    "/": Endpoint("get", "The state of the server, to look at.", _PAGE, (431, 500), OPEN, tag="page"),
    "/openapi.json": Endpoint(
        "get", "This document.", {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object"}})}
    ),
}  # fmt: skip


def endpoint(path: str) -> Endpoint | None:
    """None for one that nobody has described."""
    kind = _FILES.get(path[path.rfind(".") :]) if path.startswith("/page/") else None
    if kind is None:
        return ENDPOINTS.get(path)
    answer = {200: Answer("A file of the page.", {kind: TEXT})}
    return Endpoint("get", "A file of the page.", answer, (431, 500), OPEN, tag="page")


def document(title: str, release: str, bounds: Bounds, paths: set[str], needs_key: bool) -> dict[str, Any]:
    """Of the endpoints among `paths`. `needs_key`: there are API keys."""
    ends = ((path, endpoint(path)) for path in sorted(paths))
    found = {path: {end.method: _operation(path, end)} for path, end in ends if end is not None}
    made = {
        "CompletionRequest": requests.completion(bounds),
        "ChatRequest": requests.chat(bounds),
        "TokenizeRequest": requests.tokenize(bounds),
        "DetokenizeRequest": requests.detokenize(bounds),
        **requests.headers(bounds),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": release},
        "paths": found,
        "components": {
            "schemas": made | answers.SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if needs_key else [],
    }


def _operation(path: str, end: Endpoint) -> dict[str, Any]:
    responses = {str(status): _response(status, answer) for status, answer in end.answers.items()}
    for status in end.refusals:
        refused = Answer(REFUSALS[status], {JSON: ref("Error")})
        responses.setdefault(str(status), _response(status, refused))
    made: dict[str, Any] = {
        "operationId": f"{end.method}_{path.strip('/') or 'index'}".translate(str.maketrans("/{}.", "____")),
        "summary": end.summary,
        "tags": [end.tag],
        "parameters": list(end.parameters or (REQUEST_ID,)),
        "responses": responses,
    }
    if end.body is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(end.body)}}}
    if end.access == OPEN:
        made["security"] = []
    if end.access == ADMIN:
        made["description"] = "Shows all tenants: for the admin key, where there are keys."
    return made


def _response(status: int, answer: Answer) -> dict[str, Any]:
    headers: dict[str, Any] = {
        "X-Request-Id": {"required": True, "schema": TEXT, "description": "The client's, or a new one."}
    }
    if status in (429, 503):
        headers["Retry-After"] = {
            "required": True,
            "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
            "description": "Seconds.",
        }
    if status == 401:
        headers["WWW-Authenticate"] = {"required": True, "schema": {"const": "Bearer"}}
    content = {kind: {"schema": schema} for kind, schema in answer.content.items()}
    return {"description": answer.what, "headers": headers, "content": content}
