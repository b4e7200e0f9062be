"""Before anything is measured: is there a server, does it know the model, and what does a word cost there?

Standard library only; a few plain requests, none of them timed.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from typing import Any

from ellm.loadtest.generator.content import (
    WORDS,
    Prompt,
    PromptWriter,
    Scale,
    Stretch,
    single_token_words,
)
from ellm.loadtest.generator.http_client import error_code
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.target import Target, TargetFailed, parse_target, request_body

PROBE_WORDS = (16, 144)
TIMEOUT_S = 60.0
_HINTS = {
    400: " (--no-ignore-eos helps where a server refuses that field)",
    401: "; give --api-key",
    403: "; give --api-key",
}


def checked_target(options: Options) -> Target:
    """The target with its model, its scale and what it is. Raises ConfigError or TargetFailed."""
    target = parse_target(options)
    words: list[str] = []
    begins = 0
    if options.tokenizer is not None:
        words, begins = single_token_words(options.tokenizer)
    target = _checked_grpc(target) if target.endpoint == "grpc" else _checked_http(target)
    if options.prompt_ids or options.dataset is not None:
        return target
    if words and target.endpoint != "chat":
        return replace(target, words=tuple(words), scale=Scale(1.0, begins))
    # Also where words are one token each: a chat's template has tokens of its own.
    return replace(target, words=tuple(words), scale=_scale(target, options, tuple(words)))


def _checked_http(target: Target) -> Target:
    try:
        names = [str(model["id"]) for model in _get(target, "/v1/models")["data"]]
    except _NoSuchPage:
        if not target.model:
            raise TargetFailed(
                f"{target.url}/v1/models is not there. If this is an OpenAI-compatible server, give --model"
            ) from None
        return target
    except (KeyError, TypeError, ValueError):
        raise TargetFailed(f"{target.url}/v1/models did not answer as OpenAI's does") from None
    target = _with_model(target, names)
    ours, server = False, ""
    try:
        version = _get(target, "/version")
        server = json.dumps(version) if not isinstance(version, str) else version
        ours = "workers" in _get(target, "/admin/workers")
    except (TargetFailed, TypeError, ValueError):
        pass  # only ours has both; where they are closed to us the report goes without memory states
    return replace(target, server=server, ours=ours)


def _checked_grpc(target: Target) -> Target:
    try:
        import grpc

        from ellm.loadtest.generator.grpc_client import ask_server
    except ImportError as error:
        raise TargetFailed(f"gRPC needs the extra `serve`: {error}") from None
    try:
        server, names = asyncio.run(ask_server(target, 10.0))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise TargetFailed(f"{target.url} does not know ellm.v1.Inference") from None
        raise TargetFailed(f"cannot use {target.url}: {error.code().name}: {error.details()}") from None
    return replace(_with_model(target, names), server=server)


def _with_model(target: Target, names: list[str]) -> Target:
    if target.model and target.model not in names:
        raise TargetFailed(f"{target.url} has no model {target.model!r}; it has {', '.join(names) or 'none'}")
    if not names:
        raise TargetFailed(f"{target.url} serves no model yet")
    return replace(target, model=target.model or names[0])


def _scale(target: Target, options: Options, words: tuple[str, ...]) -> Scale:
    """From what the server counts for two prompts; one token a word where it does not count."""
    writer = PromptWriter(Scale(), words or WORDS)
    counted = []
    for number in PROBE_WORDS:
        text = writer.text(Prompt(number, (Stretch("probe", number),)))
        counted.append(_count_prompt(target, options, [{"role": "user", "content": text}]))
    return Scale.fitted(PROBE_WORDS, counted) if all(counted) else Scale()


def _count_prompt(target: Target, options: Options, messages: list[dict[str, str]]) -> int:
    if target.endpoint == "grpc":
        return asyncio.run(_count_grpc(target, options, messages))
    body = request_body(target, options, messages, 1) | {"stream": False}
    body.pop("stream_options", None)
    try:
        answer = _post(target, body)
    except (ValueError, TypeError):
        raise TargetFailed(f"{target.url}{target.path} did not answer with JSON") from None
    usage = answer.get("usage") or {}
    return int(usage.get("prompt_tokens") or 0)


async def _count_grpc(target: Target, options: Options, messages: list[dict[str, str]]) -> int:
    import grpc

    from ellm.loadtest.generator.grpc_client import generate_request, metadata_of, open_channel, stub_of

    request = generate_request(target, options, messages, None, 1)
    async with open_channel(target) as channel:
        call = stub_of(channel).Generate(request, metadata=metadata_of(target), timeout=TIMEOUT_S)
        try:
            counts = [message.usage.prompt_tokens async for message in call]
        except grpc.aio.AioRpcError as error:
            raise TargetFailed(
                f"{target.url} refuses a request: {error.code().name}: {error.details()}"
            ) from None
    return max(counts, default=0)


class _NoSuchPage(TargetFailed):
    """404: another server, or another model."""


def _get(target: Target, path: str) -> Any:
    return json.loads(_open(target, urllib.request.Request(target.url + path, headers=target.headers)))


def _post(target: Target, body: dict[str, Any]) -> Any:
    headers = target.headers | {"Content-Type": "application/json"}
    base = target.url.split("://", 1)[0] + "://" + target.url.split("://", 1)[1].split("/", 1)[0]
    request = urllib.request.Request(base + target.path, data=json.dumps(body).encode(), headers=headers)
    return json.loads(_open(target, request))


def _open(target: Target, request: urllib.request.Request) -> bytes:
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data: bytes = response.read()
            return data
    except urllib.error.HTTPError as error:
        said = error_code(error.read())
        if error.code == 404:
            raise _NoSuchPage(f"{request.full_url} answers 404: {said}") from None
        hint = _HINTS.get(error.code, "")
        raise TargetFailed(f"{request.full_url} answers {error.code}: {said}{hint}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise TargetFailed(f"cannot reach {target.url}: {reason}. Does a server listen there?") from None
