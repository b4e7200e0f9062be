"""How a string may end whose pattern noise does not come upon.

A string with a `pattern` cannot be closed before the pattern is there. A model knows from its prompt what a
date or an identifier looks like; noise would write on for ever. This knows an example of each pattern of a
schema, and which tokens of it a grammar takes just now. Nothing here decides what is allowed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

MAX_PATTERNS = 64


class Matcher(Protocol):
    """A place in a grammar."""

    def validate_tokens(self, tokens: list[int], /) -> int:
        """How many of them may follow; the place stays where it is."""
        ...


class Encoder(Protocol):
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...


class Endings:
    """Of the strings of one schema."""

    def __init__(self, schema: Any, tokenizer: Encoder) -> None:
        self._schema, self._tokenizer = schema, tokenizer
        self._texts: list[str] | None = None

    def next(self, matcher: Matcher) -> list[int]:
        """Tokens that bring the string which is being written to its end; empty where none is known."""
        if self._texts is None:
            found = dict.fromkeys(patterns(self._schema))
            self._texts = [text for pattern in list(found)[:MAX_PATTERNS] for text in examples(pattern)]
        for text in self._texts:
            quoted = json.dumps(text, ensure_ascii=False)[1:]
            for first in range(len(quoted) - 1):  # something of it may be there already
                ids = self._tokenizer.encode(quoted[first:], False)
                if matcher.validate_tokens(ids) == len(ids):
                    return ids
        return []


def patterns(schema: Any) -> Iterator[str]:
    """Of strings, and of names of properties."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        named = schema.get("patternProperties")
        yield from named if isinstance(named, dict) else ()
        for value in schema.values():
            yield from patterns(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from patterns(value)


def examples(pattern: str) -> list[str]:
    """The simplest text that has the pattern in it, and the simplest that has it behind something else; what
    there is none of, or what Python does not read, is left out."""
    from hypothesis import HealthCheck, find, settings, strategies
    from hypothesis.errors import HypothesisException

    quick = settings(database=None, max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a pattern means in Python one day
        for before in ("", "~"):
            try:
                texts = strategies.from_regex(pattern)
                found.append(find(texts, partial(_fits, re.compile(pattern), before), settings=quick))
            except (re.error, HypothesisException, NotImplementedError, OverflowError):
                continue
    return found


def _fits(pattern: re.Pattern[str], before: str, text: str) -> bool:
    return pattern.search(before + text) is not None
