"""From a client's body to what is generated: prompts as token ids, sampling, stop strings.

Checks every limit before it allocates or tokenises anything; each refusal names the field. Knows OpenAI's
fields and the tokenizer, nothing of workers but the model's context and vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from ellm.router.config import LimitsConfig
from ellm.router.grammar_check import GrammarCheck
from ellm.router.openai import fields
from ellm.router.openai.chat_parser import BEGIN, Parsing, reasons
from ellm.router.openai.chat_template import SPECIAL_TOKENS
from ellm.router.openai.job import Job, ModelBounds, Prompt
from ellm.router.openai.messages import plain_messages
from ellm.router.openai.schema import ChatRequest, CompletionRequest, TokenizeRequest
from ellm.router.openai.structured import Structure, check_company, json_grammar, structure
from ellm.router.openai.tool_calls import ToolFormat
from ellm.router.openai.tools import (
    ToolUse,
    arguments_schema,
    format_of,
    spelled_out,
    tool_use,
    tools_grammar,
)
from ellm.router.service_level import ServiceLevel
from ellm.router.tokenizer import INLINE_CHARS, Tokenizer, in_text_thread
from ellm.worker.api.errors import InvalidRequest, PromptTooLong
from ellm.worker.api.request import DEFAULT_MAX_TOKENS, SamplingParams

__all__ = ["Converter", "Job", "ModelBounds", "Prompt"]

# What the template's own names stand for is not a client's to say.
MAX_PROMPT_SCORES = 200_000  # prompt tokens x n x (logprobs + 1) of one request
_RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("self", "raise_exception", "strftime_now", "range", *SPECIAL_TOKENS),
    }
)


class Converter:
    """Holds what all requests of one model share."""

    def __init__(self, tokenizer: Tokenizer, limits: LimitsConfig) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._blanks = limits.max_json_blanks
        self._grammars = GrammarCheck(tokenizer)

    async def completion(self, body: CompletionRequest, bounds: ModelBounds) -> Job:
        """Raises InvalidRequest."""
        n = fields.checked_n(body.n, self._limits)
        if body.best_of is not None and body.best_of != n:
            raise InvalidRequest("best_of other than n is not supported", param="best_of")
        echo, asked = bool(body.echo), body.max_tokens
        if asked == 0 and not echo:
            raise InvalidRequest("max_tokens: 0 goes with echo alone", param="max_tokens")
        logprobs = fields.checked_logprobs(body.logprobs, "logprobs", self._limits)
        raw = fields.raw_prompts(body.prompt, n, self._limits)
        base = self._sampling(body, bounds, logprobs)
        job = self._job(body, n, bounds)
        base = replace(base, grammar=await self._grammar(structure(body, self._blanks), body, bounds))
        if echo:
            base = replace(base, prompt_logprobs=logprobs)
        prompts, sampling = [], []
        scores = 0
        special, chars = body.add_special_tokens is not False, sum(map(len, raw))
        for one in raw:
            prompt = await self._prompt(one, special, bounds, "prompt", chars)
            room = _room(prompt, bounds, "prompt")
            max_tokens = min(DEFAULT_MAX_TOKENS, room) if asked is None else max(1, asked)
            prompts.append(prompt)
            scores += len(prompt.ids) * n * ((logprobs or 0) + 1)
            if base.prompt_logprobs is not None and scores > MAX_PROMPT_SCORES:
                # Written out on the router's one event loop, which all streams share.
                raise InvalidRequest(
                    f"echo with logprobs: more than {MAX_PROMPT_SCORES} scores", param="echo"
                )
            base = replace(base, seed=_drawn(body.seed))  # equal prompts differ unless a seed is given
            sampling.append(_sized(base, max_tokens, room, "max_tokens"))
        return replace(
            job, prompts=tuple(prompts), sampling=tuple(sampling), echo=echo, score_only=asked == 0
        )

    async def chat(self, body: ChatRequest, bounds: ModelBounds) -> Job:
        """Raises InvalidRequest."""
        n = fields.checked_n(body.n, self._limits)
        top = fields.checked_logprobs(body.top_logprobs, "top_logprobs", self._limits)
        if top and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        newer = body.max_completion_tokens is not None
        field = "max_completion_tokens" if newer else "max_tokens"
        asked = body.max_completion_tokens if newer else body.max_tokens
        if asked == 0:
            raise InvalidRequest(f"{field}: 0 leaves nothing to generate", param=field)
        base = self._sampling(body, bounds, (top or 0) if body.logprobs else None)
        job = self._job(body, n, bounds)
        use = tool_use(body)
        form = None if use is None else format_of(self._template)
        base = replace(base, grammar=await self._chat_grammar(body, use, form, bounds))
        text = await self.rendered(body, use)
        prompt = await self._prompt(text, bool(body.add_special_tokens), bounds, "messages")
        room = _room(prompt, bounds, "messages")
        free = base.grammar is None or (use is not None and use.mixed)
        return replace(
            job,
            prompts=(prompt,),
            sampling=(_sized(base, asked or room, room, field),),
            parsing=self._parsing(body, form, text, free),
        )

    @property
    def _template(self) -> str | None:
        template = self._tokenizer.template
        return None if template is None else template.source

    def _parsing(self, body: ChatRequest, form: ToolFormat | None, text: str, free: bool) -> Parsing | None:
        thinks = reasons(self._template or "")
        if form is None and not thinks:
            return None
        opened = thinks and free and text.rstrip().endswith(BEGIN)
        return Parsing(form, thinks, opened, body.include_reasoning is not False)

    async def _chat_grammar(
        self, body: ChatRequest, use: ToolUse | None, form: ToolFormat | None, bounds: ModelBounds
    ) -> str | None:
        asked = structure(body, self._blanks)
        if use is not None and use.enforced:
            assert form is not None
            if asked is not None:
                field = "tool_choice" if use.required else "tools"
                why = "a call that must be made" if use.required else "strict, or no parallel_tool_calls,"
                raise InvalidRequest(f"{field}: {why} excludes {asked.field}", param=field)
            for tool in use.tools:
                field = f"tools[{tool.place}].function.parameters"
                arguments = json_grammar(arguments_schema(tool, self._blanks), field)
                await self._grammar(Structure(arguments, field), body, bounds)
            asked = Structure(tools_grammar(use, form, self._blanks), "tools")
        return await self._grammar(asked, body, bounds)

    async def _grammar(
        self, asked: Structure | None, body: CompletionRequest | ChatRequest, bounds: ModelBounds
    ) -> str | None:
        if asked is None:
            return None
        check_company(asked, body)
        if not bounds.grammars:
            raise InvalidRequest(f"{asked.field}: this model's workers obey no grammar", param=asked.field)
        await self._grammars.check(asked.grammar, asked.field)
        return asked.grammar

    async def rendered(self, body: ChatRequest | TokenizeRequest, use: ToolUse | None = None) -> str:
        """The text of a conversation by the model's template. Raises InvalidRequest."""
        messages = plain_messages(body.messages or [], self._limits.max_messages)
        options = dict(body.chat_template_kwargs or {})
        if _RESERVED & options.keys():
            name = min(_RESERVED & options.keys())
            raise InvalidRequest(f"chat_template_kwargs: {name} is reserved", param="chat_template_kwargs")
        goes_on = bool(body.continue_final_message)
        if goes_on and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        options["continue_final_message"] = goes_on
        options["add_generation_prompt"] = body.add_generation_prompt is not False and not goes_on
        messages = self._with_tools(messages, use, options)
        size = sum(len(message["content"] or "") for message in messages)
        if size <= INLINE_CHARS and len(options.get("tools") or ()) <= 8:
            return self._tokenizer.render_chat(messages, **options)
        return await in_text_thread(self._tokenizer.render_chat, messages, **options)

    def _with_tools(
        self, messages: list[dict[str, Any]], use: ToolUse | None, options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Where the template knows tools it gets them; any other reads of them in the messages."""
        template = self._tokenizer.template
        if template is None or template.knows_tools:
            options["tools"] = None if use is None else use.definitions
            return messages
        if use is None and not any(message.get("tool_calls") for message in messages):
            return messages
        return spelled_out(messages, use)

    async def _prompt(
        self, raw: str | list[int], add_special: bool, bounds: ModelBounds, field: str, of_chars: int = 0
    ) -> Prompt:
        if not isinstance(raw, str):
            if len(raw) > bounds.max_model_len:
                raise PromptTooLong(
                    f"{field}: {len(raw)} tokens, longer than the model's context of {bounds.max_model_len}",
                    param=field,
                )
            return Prompt(fields.checked_ids(raw, bounds.vocab_size, field), None)
        # No token is longer than the longest: a text of more bytes than that cannot fit, and is not read.
        if len(raw) > bounds.max_model_len * self._tokenizer.max_token_bytes:
            raise PromptTooLong(
                f"{field}: longer than the model's context of {bounds.max_model_len} tokens", param=field
            )
        ids = await self._tokenizer.encode_async(raw, add_special, of_chars=of_chars)
        if not ids:
            raise InvalidRequest(f"{field}: holds no token", param=field)
        return Prompt(tuple(ids), raw)

    def _sampling(
        self, body: CompletionRequest | ChatRequest, bounds: ModelBounds, logprobs: int | None
    ) -> SamplingParams:
        """Null is the default, as an absent field is. The length is set by `_sized`."""
        return SamplingParams(
            temperature=_or(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),
            top_p=_or(body.top_p, 1.0),
            min_p=body.min_p or 0.0,
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=fields.logit_bias(body.logit_bias, bounds.vocab_size, self._limits),
            seed=_drawn(body.seed),
            logprobs=logprobs,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=fields.stop_token_ids(body.stop_token_ids, bounds.vocab_size),
            ignore_eos=bool(body.ignore_eos),
        )

    def _level(self, body: CompletionRequest | ChatRequest, bounds: ModelBounds) -> ServiceLevel:
        default, limits = bounds.default_level, self._limits
        tpot_s = fields.slo_s(body.tpot_slo_ms, "tpot_slo_ms", limits)
        ttft_s = fields.slo_s(body.ttft_slo_ms, "ttft_slo_ms", limits)
        return ServiceLevel(
            default.tpot_slo_s if tpot_s is None else tpot_s,
            default.ttft_slo_s if ttft_s is None else ttft_s,
            fields.priority(body.priority, limits),
        )

    def _job(self, body: CompletionRequest | ChatRequest, n: int, bounds: ModelBounds) -> Job:
        """What needs no prompt."""
        options = body.stream_options
        if options is not None and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        level = self._level(body, bounds)
        if body.stream_pace and not body.stream:
            raise InvalidRequest("stream_pace needs stream to be true", param="stream_pace")
        if body.stream_pace and level.tpot_slo_s is None:
            raise InvalidRequest(
                "stream_pace needs tpot_slo_ms: a stream without it has no pace", param="stream_pace"
            )
        return Job(
            prompts=(),
            sampling=(),
            n=n,
            stop=fields.stop_strings(body.stop, self._limits),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
            return_token_ids=bool(body.return_token_ids),
            echo=False,
            score_only=False,
            cache_salt=body.cache_salt or "",
            level=level,
            pace=body.stream_pace,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _drawn(seed: int | None) -> int:
    """Unsigned 64 bit: the client's, or a new one, so that a request that moves goes on as it would have."""
    return random.getrandbits(64) if seed is None else seed & (2**64 - 1)


def _room(prompt: Prompt, bounds: ModelBounds, field: str) -> int:
    """Tokens that can follow the prompt: at least one."""
    room = bounds.max_model_len - len(prompt.ids)
    if room < 1:
        raise PromptTooLong(
            f"{field}: {len(prompt.ids)} tokens leave no room in the model's context of "
            f"{bounds.max_model_len} tokens",
            param=field,
        )
    return room


def _sized(base: SamplingParams, max_tokens: int, room: int, field: str) -> SamplingParams:
    if max_tokens > room:
        raise PromptTooLong(f"{field}: {max_tokens} tokens asked, {room} fit behind the prompt", param=field)
    if base.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: more than the {max_tokens} of {field}", param="min_tokens")
    return replace(base, max_tokens=max_tokens)
