"""Schemas of what the server answers: closed, so that a field nobody has described is found by the tests."""

from __future__ import annotations

from ellm.router.openapi.json_types import (
    COUNT,
    INTEGER,
    NULL,
    NUMBER,
    TEXT,
    Schema,
    any_of,
    array,
    closed,
    const,
    enum,
    nullable,
    of_dataclass,
    ref,
)
from ellm.worker.api.report import WorkerInfo, WorkerReport

_FINISH = enum("stop", "length", "abort", "error")
_CHAT_FINISH = enum("stop", "length", "tool_calls", "abort", "error")
_IDS = array(COUNT)
_WITH_IDS = {"token_ids": _IDS, "prompt_token_ids": _IDS}  # with return_token_ids


def _head(kind: str) -> Schema:
    return {
        "id": TEXT, "object": const(kind), "created": INTEGER, "model": TEXT, "system_fingerprint": TEXT
    }  # fmt: skip


def _chunk(kind: str, choice: str) -> Schema:
    """Of a stream. `usage` is null but in the last one; with continuous_usage_stats it is never null."""
    return closed({"usage": nullable(ref("Usage"))}, **_head(kind), choices=array(ref(choice)))


def _scored(**more: Schema) -> Schema:
    return closed(token=TEXT, logprob=NUMBER, bytes=array(COUNT), **more)


def _called(*, whole: bool) -> Schema:
    """A call of a function, whole or as a part of it."""
    if whole:
        function = closed(name=TEXT, arguments=TEXT)
        return closed(id=TEXT, type=const("function"), function=function)
    function = closed({"name": TEXT}, arguments=TEXT)
    return closed({"id": TEXT, "type": const("function")}, index=COUNT, function=function)


def _worker() -> Schema:
    """As `health.workers` writes it: what the worker is, what it reports, and what this router adds."""
    info = of_dataclass(WorkerInfo, without=("worker_id", "memory", "start_s"))
    report = of_dataclass(WorkerReport, without=("seq", "last_submit_seq", "state", "prefix_digest"))
    own = {
        "id": TEXT,
        "state": enum("loading", "ready", "suspect", "draining", "stalled", "failed", "lost"),
        "memory": {"type": "object", "additionalProperties": INTEGER},
        "start_s": {"type": "object", "additionalProperties": NUMBER},
        "num_here": COUNT,
        "weight": NUMBER,
        "silence_s": NUMBER,
    }
    properties = info["properties"] | report["properties"] | own
    # A worker that has only just been found has reported nothing.
    return {"type": "object", "properties": properties, "required": [*info["required"], *own]}


SCHEMAS: dict[str, Schema] = {
    "Error": closed(
        error=closed(message=TEXT, type=TEXT, param=nullable(TEXT), code=nullable(TEXT)),
    ),
    "Usage": closed(
        {"completion_tokens_details": closed(reasoning_tokens=COUNT)},
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=closed(cached_tokens=COUNT),
    ),
    "CompletionLogprobs": closed(
        tokens=array(TEXT),
        token_logprobs=array(nullable(NUMBER)),
        top_logprobs=array(nullable({"type": "object", "additionalProperties": NUMBER})),
        text_offset=array(COUNT),
    ),
    "CompletionChoice": closed(
        _WITH_IDS,
        index=COUNT,
        text=TEXT,
        logprobs=nullable(ref("CompletionLogprobs")),
        finish_reason=nullable(_FINISH),
    ),
    "Completion": closed(
        **_head("text_completion"), choices=array(ref("CompletionChoice")), usage=ref("Usage")
    ),
    "CompletionChunk": _chunk("text_completion", "CompletionChoice"),
    "ScoredToken": _scored(),
    "ChatLogprobs": closed(
        content=array(_scored(top_logprobs=array(ref("ScoredToken")))),
        refusal=NULL,
    ),
    "ToolCall": _called(whole=True),
    "ToolCallDelta": _called(whole=False),
    "AssistantMessage": closed(
        {"reasoning_content": TEXT, "tool_calls": array(ref("ToolCall"), minItems=1)},
        role=const("assistant"),
        content=nullable(TEXT),
        refusal=NULL,
    ),
    "ChatChoice": closed(
        _WITH_IDS,
        index=COUNT,
        message=ref("AssistantMessage"),
        logprobs=nullable(ref("ChatLogprobs")),
        finish_reason=_CHAT_FINISH,
    ),
    "ChatCompletion": closed(
        **_head("chat.completion"), choices=array(ref("ChatChoice")), usage=ref("Usage")
    ),
    "ChatDelta": closed(
        {
            "role": const("assistant"),
            "content": TEXT,
            "reasoning_content": TEXT,
            "tool_calls": array(ref("ToolCallDelta")),
        }
    ),
    "ChatChunkChoice": closed(
        _WITH_IDS,
        index=COUNT,
        delta=ref("ChatDelta"),
        logprobs=nullable(ref("ChatLogprobs")),
        finish_reason=nullable(_CHAT_FINISH),
    ),
    "ChatCompletionChunk": _chunk("chat.completion.chunk", "ChatChunkChoice"),
    "Model": closed(
        id=TEXT,
        object=const("model"),
        created=INTEGER,
        owned_by=TEXT,
        root=TEXT,
        parent=NULL,
        max_model_len=nullable(INTEGER),
    ),
    "ModelList": closed(object=const("list"), data=array(ref("Model"))),
    "Tokens": closed(
        count=COUNT,
        max_model_len=nullable(INTEGER),
        tokens=_IDS,
        token_strs=nullable(array(nullable(TEXT))),
    ),
    "Text": closed(prompt=TEXT),
    "Health": closed(status=TEXT, reason=TEXT),
    "Readiness": closed(status=TEXT, reason=TEXT, models={"type": "object", "additionalProperties": TEXT}),
    "Version": closed(version=TEXT),
    "Worker": _worker(),
    "Workers": closed(workers=array(ref("Worker"))),
}


def events(chunk: str) -> Schema:
    """Of each event of a stream, as OpenAPI tools read them."""
    content = {"contentMediaType": "application/json", "contentSchema": any_of(ref(chunk), ref("Error"))}
    return {
        "type": "object",
        "description": "Events `data: JSON`, the last one `data: [DONE]`. An error may come as an event.",
        "properties": {"data": {"type": "string", "anyOf": [const("[DONE]"), content]}},
        "required": ["data"],
    }
