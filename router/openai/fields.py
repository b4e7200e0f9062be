"""Checks of single fields that pydantic does not make: their size first, then each element.

Each returns what the engine takes, or raises InvalidRequest that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ellm.router.config import LimitsConfig
from ellm.worker.api.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 256
_PROMPT_FORMS = "prompt: a text, token ids, or a list of either"


def whole(value: Any) -> Any:
    """5 of 5.0; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def whole_ids(values: Any) -> Any:
    """The same for each of a list."""
    if isinstance(values, list) and float in set(map(type, values)):
        return list(map(whole, values))
    return values


def checked_n(n: int | None, limits: LimitsConfig) -> int:
    if (n or 1) > limits.max_n:
        raise InvalidRequest(f"n: at most {limits.max_n}", param="n")
    return n or 1


def checked_logprobs(count: int | None, field: str, limits: LimitsConfig) -> int | None:
    if count is not None and count > limits.max_logprobs:
        raise InvalidRequest(f"{field}: at most {limits.max_logprobs}", param=field)
    return count


def slo_s(ms: float | None, field: str, limits: LimitsConfig) -> float | None:
    """Seconds."""
    if ms is None:
        return None
    if not limits.min_slo_ms <= ms <= limits.max_slo_ms:
        raise InvalidRequest(
            f"{field}: milliseconds, {limits.min_slo_ms:g} to {limits.max_slo_ms:g}", param=field
        )
    return ms / 1000


def priority(value: int | None, limits: LimitsConfig) -> int:
    if value is None:
        return 0
    if not limits.min_priority <= value <= limits.max_priority:
        raise InvalidRequest(
            f"priority: {limits.min_priority} to {limits.max_priority}, lower runs first", param="priority"
        )
    return value


def raw_prompts(prompt: Any, n: int, limits: LimitsConfig) -> list[str | list[int]]:
    """One text, texts, ids or lists of ids, as a list of texts or a list of lists of ids."""
    prompt = whole_ids(prompt)
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(_PROMPT_FORMS, param="prompt")
    most = min(limits.max_prompts, max(1, limits.max_inflight // n))
    if len(prompt) > most:
        raise InvalidRequest(f"prompt: at most {most} prompts in one request", param="prompt")
    prompts: list[str | list[int]] = list(map(whole_ids, prompt))
    if not all(isinstance(p, str) for p in prompts) and not all(_is_ids(p) for p in prompts):
        raise InvalidRequest(_PROMPT_FORMS, param="prompt")
    return prompts


def _is_ids(prompt: Any) -> bool:
    # `type(i) is int`: True is no token
    return isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)


def checked_ids(ids: Sequence[int], vocab_size: int, field: str) -> tuple[int, ...]:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise InvalidRequest(f"{field}: token ids are 0 to {vocab_size - 1}", param=field)
    return tuple(ids)


def stop_token_ids(ids: Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    if ids is not None and len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS}", param="stop_token_ids")
    return checked_ids(ids or (), vocab_size, "stop_token_ids")


def logit_bias(bias: Any, vocab_size: int, limits: LimitsConfig) -> tuple[tuple[int, float], ...]:
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias: an object of token ids and numbers", param="logit_bias")
    if len(bias) > limits.max_logit_bias:
        raise InvalidRequest(f"logit_bias: at most {limits.max_logit_bias}", param="logit_bias")
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: a key must be a token id, 0 to {vocab_size - 1}", param="logit_bias"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise InvalidRequest("logit_bias: a value must be between -100 and 100", param="logit_bias")
        pairs[int(key)] = float(value)
    return tuple(sorted(pairs.items()))


def stop_strings(stop: Any, limits: LimitsConfig) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list):
        raise InvalidRequest("stop: a text or a list of texts", param="stop")
    if len(strings) > limits.max_stop:
        raise InvalidRequest(f"stop: at most {limits.max_stop}", param="stop")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequest("stop: a text or a list of texts, none empty", param="stop")
        if len(string) > limits.max_stop_chars:
            raise InvalidRequest(f"stop: at most {limits.max_stop_chars} characters", param="stop")
    return tuple(dict.fromkeys(strings))
