"""Whether a request can be honoured at all: the last check before the engine takes it.

The router checks the same and more at its edge. This one stands between a malformed request and a step that
would fail for everybody in it. It knows limits, not load.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

from ellm.worker.api.errors import InvalidRequest, PromptTooLong
from ellm.worker.api.request import EngineRequest, SamplingParams

_INT64 = 2**63
_MAX_SLO_S = 3600.0
_MAX_PRIORITY = 2**31 - 1


def check_request(request: EngineRequest, vocab_size: int, max_total_tokens: int) -> None:
    """Raise InvalidRequest (with `param`) or PromptTooLong unless `request` can run to its end."""
    if not request.prompt_ids:
        raise InvalidRequest("the prompt holds no token", param="prompt")
    _check_ids(request.prompt_ids, vocab_size, "prompt")
    _check_ids(request.output_ids, vocab_size, "output_ids")
    _check_lengths(request, max_total_tokens)
    _check_sampling(request.sampling, vocab_size)
    _check_service(request)


def _check_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    if not token_ids:
        return
    if set(map(type, token_ids)) != {int}:
        raise InvalidRequest("token ids must be integers", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise InvalidRequest(f"token ids must be in [0, {vocab_size})", param=param)


def _check_lengths(request: EngineRequest, max_total_tokens: int) -> None:
    sampling, num_prompt = request.sampling, len(request.prompt_ids)
    if sampling.max_tokens < 0 or (sampling.max_tokens == 0 and sampling.prompt_logprobs is None):
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidRequest(f"min_tokens must be in [0, {sampling.max_tokens}]", param="min_tokens")
    if num_prompt + max(1, sampling.max_tokens) > max_total_tokens:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens and {sampling.max_tokens} more are asked for, "
            f"but prompt and output together can have {max_total_tokens}",
            param="prompt" if num_prompt >= max_total_tokens else "max_tokens",
        )
    if request.output_ids and len(request.output_ids) >= sampling.max_tokens:
        raise InvalidRequest("output_ids hold all of max_tokens: nothing is left to do", param="output_ids")


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    ranges = (
        ("temperature", sampling.temperature, 0.0, 1e6),
        ("top_k", sampling.top_k, 0, _INT64 - 1),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("presence_penalty", sampling.presence_penalty, -1e6, 1e6),
        ("frequency_penalty", sampling.frequency_penalty, -1e6, 1e6),
        ("seed", sampling.seed, 0, 2 * _INT64 - 1),
        ("logprobs", sampling.logprobs or 0, 0, vocab_size),
        ("prompt_logprobs", sampling.prompt_logprobs or 0, 0, vocab_size),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:  # not a number is in no range
            raise InvalidRequest(f"{name} must be in [{low}, {high}]", param=name)
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest("top_p must be in (0, 1]", param="top_p")
    if not 0.0 < sampling.repetition_penalty <= 1e6:
        raise InvalidRequest("repetition_penalty must be above 0", param="repetition_penalty")
    for token_id, bias in sampling.logit_bias:
        if not 0 <= token_id < vocab_size or not isfinite(bias):
            raise InvalidRequest(f"logit_bias holds a bad entry for token {token_id}", param="logit_bias")


def _check_service(request: EngineRequest) -> None:
    """What a request expects of its turn. A time that is no number would poison the order of everybody."""
    for name, value in (("tpot_slo_s", request.tpot_slo_s), ("ttft_slo_s", request.ttft_slo_s)):
        if value is None:
            continue
        if type(value) not in (int, float) or not 0.0 < value <= _MAX_SLO_S:  # not a number is in no range
            raise InvalidRequest(f"{name} must be in (0, {_MAX_SLO_S:g}]", param=name)
    if type(request.priority) is not int or abs(request.priority) > _MAX_PRIORITY:
        raise InvalidRequest("priority must be an integer of 32 bits", param="priority")
