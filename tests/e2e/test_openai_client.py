"""The official client against the router over in-process workers: what it reads is what was said.

`_strict_response_validation` makes the client check every field against OpenAI's own types; it rejects any
streamed completion, OpenAI's too, so it is off there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.router_server import MODEL, EchoWorker, RouterServer, router_config

TEXT = "Say this: äöü 🎉"
MESSAGES: list[Any] = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def server() -> Iterator[RouterServer]:
    workers = [EchoWorker(0), EchoWorker(1)]
    with RouterServer(workers, router_config(api_keys=("secret",))) as running:
        yield running


@pytest.fixture(scope="module")
def strict(server: RouterServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="secret", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def lenient(server: RouterServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_chat(strict: openai.OpenAI) -> None:
    answer = strict.chat.completions.create(model=MODEL, messages=MESSAGES, user="u", seed=5)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer._request_id


def test_chat_streamed(strict: openai.OpenAI) -> None:
    chunks = list(
        strict.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_with_the_streaming_helper(strict: openai.OpenAI) -> None:
    with strict.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == TEXT == final.choices[0].message.content


def test_chat_log_probabilities(strict: openai.OpenAI) -> None:
    answer = strict.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=5, n=2
    )
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 5
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_completions(strict: openai.OpenAI) -> None:
    answer = strict.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=9, logprobs=2)
    assert [choice.text for choice in answer.choices] == ["one", "two"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.text_offset)
    echo = strict.completions.create(model=MODEL, prompt="one", max_tokens=9, echo=True)
    assert echo.choices[0].text == "oneone"


def test_completions_streamed(lenient: openai.OpenAI) -> None:
    chunks = list(lenient.completions.create(model=MODEL, prompt="one two", max_tokens=20, n=2, stream=True))
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == "one two"
        assert choices[-1].finish_reason == "stop"


def test_models(strict: openai.OpenAI) -> None:
    assert [model.id for model in strict.models.list()] == [MODEL]
    assert strict.models.retrieve(MODEL).id == MODEL


def test_errors_are_the_clients_own_types(strict: openai.OpenAI, server: RouterServer) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        strict.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        strict.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        strict.completions.create(model=MODEL, prompt=[5] * 3000)
    assert long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_many_at_once(server: RouterServer) -> None:
    """Each gets its own text, whole, whatever runs beside it."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> None:
        text = f"Request number {number} " * (1 + number % 7)
        stream = await client.completions.create(model=MODEL, prompt=text, max_tokens=500, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        assert "".join(pieces) == text

    async def ask_all() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:
            await asyncio.gather(*(ask(client, number) for number in range(64)))

    asyncio.run(ask_all())
    assert all(worker.front.report().generation_tokens > 0 for worker in server.workers)


def test_leaving_a_stream_frees_it(lenient: openai.OpenAI, server: RouterServer) -> None:
    stream = lenient.completions.create(
        model=MODEL, prompt="again ", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    for _ in range(500):
        if not server.service.dispatcher.admission.num_inflight:
            return
        asyncio.run(asyncio.sleep(0.01))
    raise AssertionError("the router still holds the request")
