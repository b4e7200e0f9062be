"""The bodies that clients may send, field by field: OpenAI's, and of vLLM's additions those that we honour.

Strict types: no boolean is a number, no NaN is a temperature; 5.0 is an integer, as JSON Schema has it. A
field that is not here is refused by name unless its value asks for nothing (`refuse_unknown`): silence would
let pass a typo, or a wish that we do not grant.
Limits that are configured are checked in `convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ellm.router.openai.fields import whole, whole_ids
from ellm.worker.api.errors import InvalidRequest

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True)
# A client's own business, or a hint that changes no result.
HARMLESS = frozenset(
    {
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "prediction", "parallel_tool_calls", "request_id", "extra_headers",
        "cache_prompt",
    }
)  # fmt: skip
# Values of fields that we do not honour which ask for what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "logit_processors": ([],),
    "n_probs": (0,),
}
WHOLE = BeforeValidator(whole)
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1), WHOLE]
_FIRST = Field(fail_fast=True)  # a list of a million faults has one that counts
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], _FIRST, BeforeValidator(whole_ids)]


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: Literal[False] | None = False  # padding against traffic analysis: not supported


class _Generation(BaseModel):
    """What both kinds of generation share."""

    model_config = _STRICT
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = 1
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Any = None  # {token id: number}; checked in `convert`, size first
    seed: Seed | None = None
    stop: Any = None  # str | [str]; checked in `convert`, size first
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = False
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    add_special_tokens: bool | None = None  # None: yes for text, no for a rendered chat
    return_token_ids: bool | None = False
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    tpot_slo_ms: float | None = None  # these four may come as headers: `service_level`
    ttft_slo_ms: float | None = None
    priority: Annotated[int, WHOLE] | None = None
    stream_pace: bool | None = None
    structured_outputs: Any = None  # these five ask for grammars: `structured`
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: Any = None  # str | [str] | [int] | [[int]], told apart in `convert`
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], _FIRST]
    max_completion_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: Any = None  # {"type": ...}: `structured`
    tools: Any = None  # these three: `tools`
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = True  # what a model thinks aloud comes apart from what it says


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model_config = _STRICT
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], _FIRST] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = _STRICT
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = False


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: Any) -> Body:
    """Raises InvalidRequest that names the first field at fault."""
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    try:
        parsed = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _path(first["loc"])
        raise InvalidRequest(f"{param}: {_said(first)}", param=param) from None
    refuse_unknown(parsed.model_extra or {})
    options = getattr(parsed, "stream_options", None)
    if options is not None:
        refuse_unknown(options.model_extra or {}, "stream_options.")
    return parsed


def refuse_unknown(extra: Mapping[str, Any], path: str = "") -> None:
    """Raises InvalidRequest for a field that would change the result if we knew it."""
    for name, value in extra.items():
        if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        shown = path + name[:64].encode("ascii", "replace").decode()
        if name in NEUTRAL or name in _KNOWN_UNSUPPORTED:
            raise InvalidRequest(f"{shown} is not supported", param=shown)
        raise InvalidRequest(f"{shown} is not a field of this request", param=shown)


_KNOWN_UNSUPPORTED = frozenset(
    {
        "audio", "web_search_options", "moderation", "json_schema", "grammar", "prompt_logprobs",
        "chat_template", "documents", "detokenize", "truncate",
        "truncate_prompt_tokens", "allowed_token_ids", "prompt_embeds", "echo", "logprobs",
        "mm_processor_kwargs", "typical_p", "mirostat",
    }
)  # fmt: skip


def _said(error: ErrorDetails) -> str:
    """pydantic's words, without its own types' names."""
    if error["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "input should be an object"
    return error["msg"].lower()


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") is messages[0].role."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path[:128].encode("ascii", "replace").decode()
