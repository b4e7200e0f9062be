"""Generate gives what HTTP gives, by the message's fields."""

from __future__ import annotations

from typing import Any

import pytest
from support.router_server import MODEL, RouterServer
from support.rpc import Client, request, text_of, trailing

from ellm.router.rpc import ellm_inference_pb2 as pb

PROMPT = "the quick brown fox jumps"


def over_http(server: RouterServer, path: str = "/v1/completions", **body: Any) -> Any:
    with server.client() as client:
        response = client.post(path, json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_stream_is_what_http_says(rpc_server: RouterServer, rpc: Client) -> None:
    responses = rpc.generate(request(PROMPT, max_tokens=12))
    told = over_http(rpc_server, prompt=PROMPT, max_tokens=12, temperature=0, return_token_ids=True)
    choice = told["choices"][0]
    assert text_of(responses) == choice["text"]
    assert [i for one in responses for i in one.token_ids] == choice["token_ids"]
    *others, last = responses
    assert last.finish_reason == choice["finish_reason"]
    assert not any(one.finish_reason for one in others)
    assert not any(one.HasField("usage") for one in others)
    assert last.usage.prompt_tokens == told["usage"]["prompt_tokens"]
    assert last.usage.completion_tokens == told["usage"]["completion_tokens"]
    assert len({one.request_id for one in responses}) == 1


def test_not_streamed_is_one_message_per_choice(rpc: Client) -> None:
    message = request(PROMPT, n=3, max_tokens=10)
    streamed = rpc.generate(message)
    message.stream = False
    whole = rpc.generate(message)
    assert [one.index for one in whole] == [0, 1, 2]
    for one in whole:
        assert one.text == text_of(streamed, one.index)
        assert list(one.token_ids) == [i for s in streamed if s.index == one.index for i in s.token_ids]
        assert one.finish_reason
        assert one.usage.completion_tokens == len(one.token_ids)


def test_token_ids_and_a_chat(rpc_server: RouterServer, rpc: Client) -> None:
    params = pb.SamplingParams(max_tokens=6, temperature=0)
    ids = [300, 301, 302, 303]
    by_ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling_params=params)
    assert [i for one in rpc.generate(by_ids) for i in one.token_ids][:4] == ids
    turn = {"role": "user", "content": "hello there"}
    chat = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(**turn)]), sampling_params=params)
    told = over_http(rpc_server, "/v1/chat/completions", messages=[turn], max_tokens=6, temperature=0)
    responses = rpc.generate(chat)
    assert text_of(responses) == told["choices"][0]["message"]["content"]
    assert responses[-1].usage.prompt_tokens == told["usage"]["prompt_tokens"]


@pytest.mark.parametrize("chat", [False, True])
def test_logprobs(rpc: Client, chat: bool) -> None:
    params = pb.SamplingParams(max_tokens=3, temperature=0, logprobs=2, ignore_eos=True)
    message = pb.GenerateRequest(text=PROMPT, sampling_params=params)
    if chat:
        message.chat.messages.add(role="user", content=PROMPT)
    responses = rpc.generate(message)
    scores = [score for one in responses for score in one.logprobs]
    ids = [i for one in responses for i in one.token_ids]
    assert [score.token.token_id for score in scores] == ids
    assert all(len(score.top) == 2 for score in scores)
    assert all(score.token.logprob <= 0.0 for score in scores)
    if not chat:
        assert b"".join(score.token.token for score in scores[1:]).decode() == text_of(responses)  # a BOS


def test_a_stop_string_ends_it(rpc: Client) -> None:
    responses = rpc.generate(request(PROMPT, max_tokens=50, stop=["brown"]))
    assert text_of(responses) == "the quick "
    assert responses[-1].finish_reason == "stop"


def test_a_sampled_one_is_that_of_its_seed(rpc_server: RouterServer, rpc: Client) -> None:
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": -5, "max_tokens": 8}
    told = over_http(rpc_server, prompt=PROMPT, **params)
    assert text_of(rpc.generate(request(PROMPT, **params))) == told["choices"][0]["text"]


def test_ids_come_back(rpc: Client) -> None:
    message = request(PROMPT)
    message.request_id = "mine"
    call = rpc.inference.Generate(message, metadata=(("x-request-id", "outer-1"),), timeout=60)
    assert {one.request_id for one in call} == {"mine"}
    assert trailing(call)["x-request-id"] == "outer-1"
    assert dict(call.initial_metadata())["x-request-id"] == "outer-1"
    assert {one.request_id for one in rpc.generate(request(PROMPT), (("x-request-id", "outer-2"),))} == {
        "outer-2"
    }


def test_a_repeated_prompt_is_found_in_the_cache(rpc: Client) -> None:
    text = "a prompt of its own that is said twice, longer than one block of sixteen tokens is " * 3
    message = request(text)
    rpc.generate(message)
    assert rpc.generate(message)[-1].usage.cached_tokens >= 16
    message.cache_salt = "another"
    assert rpc.generate(message)[-1].usage.cached_tokens == 0


def test_metadata_sets_what_headers_set(rpc_server: RouterServer, rpc: Client) -> None:
    before = dict(rpc_server.service.metrics.finished)
    rpc.generate(request(PROMPT), (("x-ellm-tpot-slo-ms", "50"), ("x-ellm-priority", "3")))
    assert sum(rpc_server.service.metrics.finished.values()) == sum(before.values()) + 1


def test_what_is_known_of_the_model_and_the_server(rpc_server: RouterServer, rpc: Client) -> None:
    info = rpc.inference.GetModelInfo(pb.GetModelInfoRequest(), timeout=60)
    assert (info.served_model_name, info.is_ready, info.max_context_length) == (MODEL, True, 2048)
    assert (info.vocab_size, list(info.eos_token_ids), info.block_size) == (4096, [1, 2], 16)
    found = rpc.inference.GetServerInfo(pb.GetServerInfoRequest(), timeout=60)
    assert found.server == "ellm"
    assert list(found.models) == [MODEL]
    assert found.max_message_bytes == rpc_server.config.limits.max_body_bytes
    loads = rpc.inference.GetLoads(pb.GetLoadsRequest(), timeout=60).loads
    (load,) = loads
    assert (load.worker_id, load.model, load.state) == ("w0", MODEL, "ready")
    assert load.max_total_num_tokens == 2048 * 16
    assert 0 <= load.num_used_tokens <= load.max_total_num_tokens
    assert load.headroom_tokens > 0
    of_one = rpc.inference.GetLoads(pb.GetLoadsRequest(model=MODEL), timeout=60)
    assert [one.worker_id for one in of_one.loads] == ["w0"]
