"""Tools of a chat: what a client may define, which choice it makes, and how the model is told.

A template that takes `tools` gets them as they came. To any other they are spelled out in the system message,
in the words of the Hermes format, and so are the calls and results of earlier turns. Knows messages and
grammars as text, nothing of what a model answers: that is `tool_calls`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from ellm.router.openai.structured import BLANKS, whitespace
from ellm.router.openai.tool_calls import HERMES, LLAMA3, ToolFormat
from ellm.worker.api.errors import InvalidRequest

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 128 * 1024  # of all definitions together
MAX_CALLS = 8  # in one answer that must call
FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CHOICES = "none, auto, required, or an object that names a function"


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: Mapping[str, Any]  # a JSON schema of an object
    strict: bool
    definition: Mapping[str, Any]  # as it came
    place: int  # in `tools`


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that the model may call, or must."""

    tools: tuple[Tool, ...]
    required: bool
    parallel: bool  # more than one call in an answer

    @property
    def enforced(self) -> bool:
        """Calls are held to a grammar: they must be made, or are promised to be of their schema or single.
        Any others are only found in what the model says."""
        return self.required or not self.parallel or any(tool.strict for tool in self.tools)

    @property
    def mixed(self) -> bool:
        """Text is free, and calls are not."""
        return self.enforced and not self.required

    @property
    def definitions(self) -> list[Mapping[str, Any]]:
        return [tool.definition for tool in self.tools]


def tool_use(body: Any) -> ToolUse | None:
    """Of a ChatRequest; None where nothing may be called. Raises InvalidRequest that names the field."""
    tools = _tools(body.tools)
    choice = body.tool_choice
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    parallel = body.parallel_tool_calls is not False
    if choice in (None, "auto", "required"):
        return ToolUse(tools, choice == "required", parallel)
    if choice == "none":
        return None
    if not isinstance(choice, Mapping):
        raise InvalidRequest(f"tool_choice: {_CHOICES}", param="tool_choice")
    return _chosen(tools, choice, parallel)


def tools_grammar(use: ToolUse, form: ToolFormat, blanks: int = BLANKS) -> str:
    """In Lark: calls, each with its function's arguments; where none must be made, also text without any."""
    calls, rules = [], []
    for i, tool in enumerate(use.tools):
        head = f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '
        begin = form.begin + head
        if not use.required:
            begin = begin.removeprefix(form.opening)  # which ends the text before it
        begin, end = json.dumps(begin), json.dumps("}" + form.end)
        calls.append(f"call_{i}")
        rules.append(f"call_{i}: {begin} arguments_{i} {end}")
        rules.append(f"arguments_{i}: %json {orjson.dumps(arguments_schema(tool, blanks)).decode()}")
    more = f"({json.dumps(form.between)} call){{0,{MAX_CALLS - 1}}}" if use.parallel else ""
    start = [f"start: call {more}"] if use.required else _text_or_calls(form, more, use.parallel)
    return "\n".join([*start, "call: " + " | ".join(calls), *rules])


def _text_or_calls(form: ToolFormat, more: str, parallel: bool) -> list[str]:
    """The rules of what begins as text. Once a call has begun, nothing but one of the functions follows."""
    if not form.opening:  # calls stand instead of a text, and no text looks as if it began one
        text = r"TEXT: /[ \t\r\n]*([^ \t\r\n{<](.|\n)*|<([^|](.|\n)*)?)?/"  # <| begins Llama's tag
        return [f"start: TEXT | call {more}", text]
    start = "start: (begun call)* TEXT" if parallel else "start: TEXT | begun call"
    return [start, f"begun[lazy]: TEXT {json.dumps(form.opening)}", "TEXT: /(.|\\n)*/"]


def arguments_schema(tool: Tool, blanks: int = BLANKS) -> dict[str, Any]:
    """What the arguments must be; of a function that is not strict, as far as it can be obeyed."""
    guidance: dict[str, Any] = {"whitespace_pattern": whitespace(blanks), "lenient": not tool.strict}
    own = tool.parameters.get("x-guidance")
    guidance |= own if isinstance(own, dict) else {}
    return {"type": "object", **tool.parameters, "x-guidance": guidance}


def format_of(template: str | None) -> ToolFormat:
    """How a model with this chat template writes calls. Raises InvalidRequest where nobody knows."""
    if template is None or "tools" not in template or "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or '"parameters"' in template or "ipython" in template:
        return LLAMA3
    raise InvalidRequest("tools: this model's way to write calls is not known here", param="tools")


def spelled_out(messages: Sequence[Mapping[str, Any]], use: ToolUse | None) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools."""
    plain = [_spelled(message) for message in messages]
    if use is None:
        return plain
    lines = "\n".join(orjson.dumps(tool.definition).decode() for tool in use.tools)
    told = (
        f"# Tools\n\nYou may call functions. Their definitions:\n<tools>\n{lines}\n</tools>\n\n"
        "For each call write a JSON object with the function's name and its arguments:\n"
        '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    )
    if plain and plain[0]["role"] in ("system", "developer"):
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _spelled(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    parts = [message["content"]] if message["content"] else []
    parts += [
        f"{HERMES.begin}{json.dumps({k: call['function'][k] for k in ('name', 'arguments')})}{HERMES.end}"
        for call in calls
    ]
    return {"role": message["role"], "content": "\n".join(parts)}


def _tools(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidRequest("tools: a list", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS}", param="tools")
    try:
        size = len(orjson.dumps(tools))
    except (orjson.JSONEncodeError, RecursionError):
        raise InvalidRequest("tools: nested too deeply", param="tools") from None
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS_BYTES} bytes", param="tools")
    made = tuple(_tool(tool, i) for i, tool in enumerate(tools))
    if len({tool.name for tool in made}) < len(made):
        raise InvalidRequest("tools: two functions of one name", param="tools")
    return made


def _tool(tool: Any, place: int) -> Tool:
    path = f"tools[{place}]"
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise InvalidRequest(f"{path}.type: function; others are not supported", param=f"{path}.type")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{path}.function: an object", param=f"{path}.function")
    for name in function.keys() - FUNCTION_FIELDS:
        shown = f"{path}.function.{name[:64]}".encode("ascii", "replace").decode()
        raise InvalidRequest(f"{shown} is not a field of a function", param=shown)
    name, parameters, strict = function.get("name"), function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{path}.function.name: 1 to 64 letters, digits, _, . and -", param=f"{path}.function.name"
        )
    if not isinstance(function.get("description"), str | None):
        raise InvalidRequest(f"{path}.function.description: a text", param=f"{path}.function.description")
    if not isinstance(strict, bool | None):
        raise InvalidRequest(f"{path}.function.strict: true or false", param=f"{path}.function.strict")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f"{path}.function.parameters: a JSON schema of an object", param=f"{path}.function.parameters"
        )
    return Tool(name, parameters, bool(strict), tool, place)


def _chosen(tools: tuple[Tool, ...], choice: Mapping[str, Any], parallel: bool) -> ToolUse:
    kind = choice.get("type")
    if kind == "function":
        return ToolUse((_named(tools, choice, "tool_choice"),), True, False)
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
        listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
        field = "tool_choice.allowed_tools"
        if (
            mode not in ("auto", "required")
            or not isinstance(listed, list)
            or not 0 < len(listed) <= MAX_TOOLS
        ):
            raise InvalidRequest(f"{field}: a mode, auto or required, and tools", param=field)
        names = {_named(tools, one, f"{field}.tools[{i}]").name for i, one in enumerate(listed)}
        return ToolUse(tuple(tool for tool in tools if tool.name in names), mode == "required", parallel)
    raise InvalidRequest(f"tool_choice: {_CHOICES}", param="tool_choice.type")


def _named(tools: tuple[Tool, ...], choice: Any, field: str) -> Tool:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    for tool in tools:
        if tool.name == name:
            return tool
    raise InvalidRequest(f"{field}.function.name: none of the tools", param=f"{field}.function.name")
