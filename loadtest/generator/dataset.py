"""Conversations from a file: ShareGPT's JSON, or JSON lines with prompts or messages.

    [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}, ...]
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}          or "output_tokens": N

Lengths of answers are estimated from their text where the file does not say them: 4 characters a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ellm.loadtest.generator.content import Prompt
from ellm.worker.api.errors import ConfigError

CHARACTERS_PER_TOKEN = 4
DEFAULT_OUTPUT = 128  # where nothing says how long the answer was
ASKS, ANSWERS = {"human", "user"}, {"gpt", "assistant", "chatgpt", "bing", "bard"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What is said, and how many tokens are asked for."""

    prompt: Prompt
    output_tokens: int


def read_dataset(path: Path) -> list[list[Turn]]:
    """The turns of every conversation that has one. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if text.lstrip().startswith("[") else list(_lines(text))
        conversations = [turns for entry in entries if (turns := _turns(entry))]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset: cannot read {path}: {error}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"--dataset: {path} is no dataset that is known here: {error}") from error
    if not conversations:
        raise ConfigError(f"--dataset: {path} holds no conversation, message or prompt")
    return conversations


def _lines(text: str) -> Iterator[Any]:
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def _turns(entry: Mapping[str, Any]) -> list[Turn]:
    if "prompt" in entry:
        asked, length = str(entry["prompt"]), entry.get("output_tokens")
        answer = entry.get("completion", entry.get("response"))
        return [Turn(_prompt(asked), int(length) if length else _tokens(answer))] if asked else []
    if "conversations" not in entry and "messages" not in entry:
        raise ValueError("an entry has neither conversations, messages nor prompt")
    said = [
        (str(part.get("from", part.get("role"))), str(part.get("value", part.get("content")) or ""))
        for part in entry.get("conversations", entry.get("messages"))
    ]
    turns, before = [], ""
    for place, (who, text) in enumerate(said):
        if who in ASKS and text:
            following = said[place + 1] if place + 1 < len(said) else ("", "")
            turns.append(
                Turn(_prompt(before + text), _tokens(following[1] if following[0] in ANSWERS else None))
            )
            before = ""
        elif who == "system":
            before = f"{text}\n"
    return turns


def _prompt(text: str) -> Prompt:
    return Prompt(max(1, len(text) // CHARACTERS_PER_TOKEN), text=text)


def _tokens(text: Any) -> int:
    return max(1, len(str(text)) // CHARACTERS_PER_TOKEN) if text else DEFAULT_OUTPUT
