"""Generate's message as a body of OpenAI's fields, which the one converter checks and converts.

What repeats is counted before it is copied: a message of some megabytes may hold millions of parts. Fields
that are absent stay absent. Errors name the field of the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ellm.router.config import LimitsConfig
from ellm.router.exchange import Kind
from ellm.router.openai.fields import MAX_STOP_TOKEN_IDS
from ellm.router.rpc.ellm_inference_pb2 import Chat, GenerateRequest, SamplingParams
from ellm.worker.api.errors import InvalidRequest

_SCALARS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "n", "seed", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip
_OF_REQUEST = ("add_special_tokens", "cache_salt", "tpot_slo_ms", "ttft_slo_ms", "priority")
_GUIDES = ("guided_json", "guided_regex", "guided_grammar")
MAX_CHOICES = 4096
MAX_REQUEST_ID = 128


def generate_body(request: GenerateRequest, limits: LimitsConfig) -> tuple[Kind, dict[str, Any]]:
    """Raises InvalidRequest."""
    body = {name: getattr(request, name) for name in _OF_REQUEST if request.HasField(name)}
    params = request.sampling_params
    body.update((name, getattr(params, name)) for name in _SCALARS if params.HasField(name))
    body.update((name, getattr(params, name)) for name in _GUIDES if getattr(params, name))
    body.update(_repeated(params, limits))
    body["return_token_ids"] = True
    if request.model:
        body["model"] = request.model
    chosen = request.WhichOneof("input")
    if chosen == "chat":
        body.update(_chat(request.chat, limits))
        if params.HasField("logprobs"):
            body.update(logprobs=True, top_logprobs=params.logprobs)
        return "chat", body
    if chosen is None:
        raise InvalidRequest("one of text, token_ids and chat", param="input")
    body["prompt"] = request.text if chosen == "text" else list(request.token_ids.ids)
    if params.HasField("logprobs"):
        body["logprobs"] = params.logprobs
    return "completion", body


def _repeated(params: SamplingParams, limits: LimitsConfig) -> Iterator[tuple[str, Any]]:
    for name, most in (
        ("stop", limits.max_stop),
        ("stop_token_ids", MAX_STOP_TOKEN_IDS),
        ("logit_bias", limits.max_logit_bias),
        ("guided_choice", MAX_CHOICES),
    ):
        if len(getattr(params, name)) > most:
            raise InvalidRequest(f"{name}: at most {most}", param=name)
    if params.stop:
        yield "stop", list(params.stop)
    if params.guided_choice:
        yield "guided_choice", list(params.guided_choice)
    if params.stop_token_ids:
        yield "stop_token_ids", list(params.stop_token_ids)
    if params.logit_bias:
        yield "logit_bias", {str(key): value for key, value in params.logit_bias.items()}


def _chat(chat: Chat, limits: LimitsConfig) -> dict[str, Any]:
    if len(chat.messages) > limits.max_messages:
        raise InvalidRequest(f"messages: at most {limits.max_messages}", param="messages")
    messages = []
    for message in chat.messages:
        made = {"role": message.role, "content": message.content}
        if message.name:
            made["name"] = message.name
        messages.append(made)
    body: dict[str, Any] = {"messages": messages}
    for name in ("add_generation_prompt", "continue_final_message"):
        if chat.HasField(name):
            body[name] = getattr(chat, name)
    return body


@contextmanager
def fields_named(names: dict[str, str]) -> Iterator[None]:
    """Within it, an InvalidRequest that names one of OpenAI's fields names the message's field instead."""
    try:
        yield
    except InvalidRequest as error:
        for old, new in names.items():
            param = error.param or ""
            if param == old or param.startswith((f"{old}[", f"{old}.")):
                error.param = new + param.removeprefix(old)
                if error.message.startswith(old):
                    error.message = new + error.message.removeprefix(old)
                break
        raise
