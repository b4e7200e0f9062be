"""litellm: chats and completions, whole, streamed, in parallel; tools, JSON, log-probabilities, errors."""

import asyncio
import json
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices
import litellm

litellm.suppress_debug_info = True

URL, MODEL = sys.argv[1:3]
BASE: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
CHAT: dict[str, Any] = {
    **BASE, "model": f"openai/{MODEL}", "messages": [{"role": "user", "content": "Describe a list."}]
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FUNCTION = {"name": "set", "description": "Sets it.", "parameters": SCHEMA}


def check(name: str, holds: Any) -> None:
    assert holds, name
    print(name, flush=True)


def main() -> None:
    whole = litellm.completion(**CHAT, max_tokens=12, temperature=0)
    check("chat", whole.choices[0].message.content and whole.usage.completion_tokens > 0)
    chunks = list(litellm.completion(**CHAT, max_tokens=12, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    check("chat, streamed: the same text", text == whole.choices[0].message.content)
    usage = list(
        litellm.completion(**CHAT, max_tokens=5, stream=True, stream_options={"include_usage": True})
    )
    check("usage of a stream", usage[-1].usage.completion_tokens > 0)
    scored = litellm.completion(**CHAT, max_tokens=3, logprobs=True, top_logprobs=2)
    check("log-probabilities", len(scored.choices[0].logprobs.content[0].top_logprobs) == 2)
    many = litellm.completion(**CHAT, max_tokens=3, n=2, seed=1, stop=["zzz"], presence_penalty=0.5)
    check("two choices", len(many.choices) == 2)
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    made = json.loads(litellm.completion(**CHAT, response_format=form).choices[0].message.content)
    check("JSON of a schema", isinstance(made["ok"], bool) and 0 <= made["n"] <= 9)
    tools = {"tools": [{"type": "function", "function": FUNCTION}]}
    named = {"type": "function", "function": {"name": "set"}}
    called = litellm.completion(**CHAT, **tools, tool_choice=named)
    call = called.choices[0].message.tool_calls[0].function
    check("a named tool", call.name == "set" and set(json.loads(call.arguments)) == {"ok", "n"})
    parts = litellm.completion(**CHAT, **tools, tool_choice="required", stream=True)
    rebuilt = litellm.stream_chunk_builder(list(parts))
    calls = rebuilt.choices[0].message.tool_calls
    check("tools, streamed", all(set(json.loads(c.function.arguments)) == {"ok", "n"} for c in calls))
    free = litellm.completion(**CHAT, **tools, tool_choice="auto", max_tokens=8)
    check("tools, auto", free.choices[0].finish_reason in ("length", "stop", "tool_calls"))
    plain = litellm.text_completion(
        **BASE, model=f"text-completion-openai/{MODEL}", prompt="A list is", max_tokens=8, logprobs=1
    )
    check("completion", plain.choices[0].text)
    text_chunks = litellm.text_completion(
        **BASE, model=f"text-completion-openai/{MODEL}", prompt="A list is", max_tokens=8, stream=True
    )
    check("completion, streamed", "".join(c.choices[0].text or "" for c in text_chunks))

    async def at_once() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**CHAT, max_tokens=5) for _ in range(16)))

    check("sixteen at once", len(asyncio.run(at_once())) == 16)
    try:
        litellm.completion(**CHAT | {"model": "openai/no-such"})
    except litellm.NotFoundError:
        check("its own error for a model that is not there", True)
    try:
        litellm.completion(**CHAT, temperature=9)
    except litellm.BadRequestError:
        check("its own error for a bad field", True)


if __name__ == "__main__":
    main()
