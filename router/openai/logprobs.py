"""Scored tokens in OpenAI's two shapes: lists side by side (completions), objects (chat)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ellm.router.sequence import ScoredToken
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.output import TokenLogprobs

LOWEST = -9999.0  # JSON has no -inf


def token_text(data: bytes) -> str:
    """A token's text; where it is no whole characters, its bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    scored: Sequence[ScoredToken], tokenizer: Tokenizer, base_offset: int
) -> dict[str, Any]:
    """`base_offset`: characters of the answer's text before the sequence's own."""
    tokens, offsets = [], []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for entry in scored:
        text = token_text(tokenizer.token_bytes(entry.token_id))
        tokens.append(text)
        offsets.append(base_offset + entry.offset)
        if entry.logprobs is None:
            chosen.append(None)
            tops.append(None)
        else:
            logprob = _clipped(entry.logprobs.logprob)
            chosen.append(logprob)
            tops.append(_top(entry.logprobs, tokenizer) | {text: logprob})
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


def _top(logprobs: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Most likely first. Two tokens of the same text share a key: the likelier one keeps it."""
    top: dict[str, float] = {}
    for token_id, logprob in logprobs.top:
        top.setdefault(token_text(tokenizer.token_bytes(token_id)), _clipped(logprob))
    return top


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    content = []
    for entry in scored:
        assert entry.logprobs is not None
        one = _object(entry.token_id, entry.logprobs.logprob, tokenizer)
        one["top_logprobs"] = [
            _object(token_id, logprob, tokenizer) for token_id, logprob in entry.logprobs.top
        ]
        content.append(one)
    return {"content": content, "refusal": None}


def _object(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": token_text(data), "logprob": _clipped(logprob), "bytes": list(data)}


def _clipped(logprob: float) -> float:
    return max(logprob, LOWEST)


def scored_prompt(
    prompt_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
) -> list[ScoredToken]:
    """A prompt's tokens with where their text begins in the prompt's."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    scored, length = [], 0
    for token_id, token_logprobs in zip(prompt_ids, logprobs, strict=True):
        scored.append(ScoredToken(token_id, length, token_logprobs))
        length += len(detokenizer.feed((token_id,)))
    return scored
