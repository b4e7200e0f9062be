"""Renders a checkpoint's chat template as transformers does: Jinja in a sandbox with the same extras.

A template comes with the model, its input from the client: neither is trusted. What a template refuses
(`raise_exception`) is the client's error, and so is whatever else it stumbles over in the messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ellm.worker.api.errors import ConfigError, InvalidRequest

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Refused(TemplateError):
    """The template's own `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; in rendering it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, this escapes no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Refused(message)


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigError when the template does not parse."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self.knows_tools = "tools" in source
        self._knows_developers = "developer" in source  # the newer name of the system role
        try:
            self._render: Callable[..., str] = _environment().from_string(source).render
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template does not parse: {error}") from None

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
        """From chat_template.jinja, chat_template.json or tokenizer_config.json; None where there is none."""
        source = _source(folder, config)
        if source is None:
            return None
        path = folder / "special_tokens_map.json"
        named = json.loads(path.read_text()) if path.is_file() else {}
        tokens = {}
        for name in SPECIAL_TOKENS:
            token = config.get(name) or named.get(name)
            if token is not None:
                tokens[name] = token["content"] if isinstance(token, dict) else str(token)
        return cls(source, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text. `continue_final_message` leaves the last message open. Raises InvalidRequest."""
        if not self._knows_developers:
            messages = [
                m | {"role": "system"} if m["role"] == "developer" else m for m in map(dict, messages)
            ]
        values = self._special_tokens | variables
        try:
            text = self._render(
                messages=messages, add_generation_prompt=add_generation_prompt, **(values | {"tools": tools})
            )
        except _Refused as error:
            raise InvalidRequest(f"the chat template refuses: {error.message}", param="messages") from None
        except SecurityError:
            raise InvalidRequest("the chat template may not do that", param="messages") from None
        except Exception:  # whatever the template's code does with the client's data
            raise InvalidRequest("the chat template cannot render these messages", param="messages") from None
        return _cut_at_end_of(text, messages) if continue_final_message else text


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    path = folder / "chat_template.json"
    template = json.loads(path.read_text()).get("chat_template") if path.is_file() else None
    template = template or config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _cut_at_end_of(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Drop what the template puts behind the last message."""
    last = str(messages[-1].get("content") or "").strip()
    at = text.rfind(last)
    if at < 0:
        raise InvalidRequest("the chat template changes the final message", param="continue_final_message")
    return text[: at + len(last)]
