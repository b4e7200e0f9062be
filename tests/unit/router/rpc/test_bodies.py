"""Every field of a message is in the body, under HTTP's name, or is used by itself."""

from __future__ import annotations

from ellm.router.config import LimitsConfig
from ellm.router.rpc import ellm_inference_pb2 as pb
from ellm.router.rpc.bodies import generate_body

BY_ITSELF = {"request_id", "stream", "session_id", "sampling_params", "text", "token_ids", "chat"}


def test_no_field_is_forgotten() -> None:
    params = pb.SamplingParams(
        temperature=0.5, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.3, max_tokens=7, min_tokens=2, n=2, seed=-9, stop=["a", "b"], stop_token_ids=[5],
        ignore_eos=False, include_stop_str_in_output=True, skip_special_tokens=False, logprobs=4,
        logit_bias={7: -1.5}, guided_json="{}", guided_regex="a+", guided_grammar="g", guided_choice=["x"],
    )  # fmt: skip
    request = pb.GenerateRequest(
        request_id="r", model="m", text="t", sampling_params=params, stream=False, add_special_tokens=False,
        cache_salt="s", session_id="i", tpot_slo_ms=1.5, ttft_slo_ms=2.5, priority=-3,
    )  # fmt: skip
    of_params = set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    assert {field.name for field, _ in params.ListFields()} == of_params
    kind, body = generate_body(request, LimitsConfig())
    assert kind == "completion"
    fields = of_params | set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert body.keys() == (fields - BY_ITSELF) | {"prompt", "return_token_ids"}
    assert body["prompt"] == "t"
    assert body["logit_bias"] == {"7": -1.5}
    for name in fields - BY_ITSELF - {"logit_bias", "model", "stop", "stop_token_ids", "guided_choice"}:
        of = params if name in of_params else request
        assert body[name] == getattr(of, name)
    assert (body["stop"], body["stop_token_ids"], body["guided_choice"]) == (["a", "b"], [5], ["x"])


def test_what_is_absent_stays_so() -> None:
    _, body = generate_body(pb.GenerateRequest(text=""), LimitsConfig())
    assert body == {"prompt": "", "return_token_ids": True}


def test_a_chat() -> None:
    chat = pb.Chat(continue_final_message=True, add_generation_prompt=False)
    chat.messages.add(role="user", content="hi", name="me")
    chat.messages.add(role="assistant")
    request = pb.GenerateRequest(chat=chat, sampling_params=pb.SamplingParams(logprobs=0))
    kind, body = generate_body(request, LimitsConfig())
    assert kind == "chat"
    assert body == {
        "messages": [{"role": "user", "content": "hi", "name": "me"}, {"role": "assistant", "content": ""}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
    }
