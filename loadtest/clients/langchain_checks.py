"""langchain-openai: invoke, stream, batch, structured output by schema and by function, bound tools."""

import asyncio
import sys
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1:3]
BASE: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "max_retries": 0}


class Answer(BaseModel):
    """An answer."""

    ok: bool
    stars: int = Field(ge=0, le=9)


@tool
def look_up(number: int, exact: bool) -> str:
    """Looks a number up."""
    return f"{number} {exact}"


def check(name: str, holds: Any) -> None:
    assert holds, name
    print(name, flush=True)


def main() -> None:
    chat = ChatOpenAI(**BASE, max_tokens=12, temperature=0, timeout=120)
    messages = [SystemMessage("Be brief."), HumanMessage("Describe a list.")]
    whole = chat.invoke(messages)
    check("invoke", whole.content and whole.usage_metadata["output_tokens"] > 0)
    chunks = list(chat.stream(messages, stream_usage=True))
    check("stream: the same text", "".join(str(chunk.content) for chunk in chunks) == whole.content)
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    check("usage of a stream", total.usage_metadata["output_tokens"] > 0)
    check("batch", len(chat.batch([messages] * 8)) == 8)
    check("at once", len(asyncio.run(chat.abatch([messages] * 8))) == 8)
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(messages)
    check("log-probabilities", len(scored.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2)
    parts = [HumanMessage([{"type": "text", "text": "Describe"}, {"type": "text", "text": "a list."}])]
    check("content parts", chat.invoke(parts).content)
    free = ChatOpenAI(**BASE, temperature=0, timeout=120)
    for method in ("json_schema", "function_calling"):
        made = free.with_structured_output(Answer, method=method).invoke(messages)
        check(f"structured output by {method}", isinstance(made, Answer))
    strict = free.with_structured_output(Answer, method="function_calling", strict=True).invoke(messages)
    check("structured output, strict", isinstance(strict, Answer))
    called = free.bind_tools([look_up], tool_choice="look_up").invoke(messages)
    check("a bound tool is called", set(called.tool_calls[0]["args"]) == {"number", "exact"})
    streamed = free.bind_tools([look_up], tool_choice="any").stream(messages)
    gathered = next(streamed)
    for chunk in streamed:
        gathered = gathered + chunk
    check("a tool, streamed", isinstance(gathered.tool_calls[0]["args"]["number"], int))
    result = look_up.invoke(called.tool_calls[0])
    check("and its result goes back", isinstance(chat.invoke([*messages, called, result]), AIMessage))
    assert isinstance(result, ToolMessage)
    check("tools, auto", isinstance(chat.bind_tools([look_up]).invoke(messages), AIMessage))
    check(
        "tools, auto and strict",
        isinstance(chat.bind_tools([look_up], strict=True).invoke(messages), AIMessage),
    )
    completion = OpenAI(**BASE, max_tokens=8, temperature=0)
    text = completion.invoke("A list is")
    check("completion", text)
    check("completion, streamed", "".join(completion.stream("A list is")) == text)


if __name__ == "__main__":
    main()
