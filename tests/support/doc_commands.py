"""Finds the commands of ours in the documents: in fenced blocks, and in code within a line or a table.

A command is what begins with `ellm ` or `python -m ellm.`; what stands before it in a block (variables, a
folder) and after it (a comment, a pipe, a redirection) is no part of it. A table's synopsis is made a
command: `[...]` is given, `a|b` is each in turn, and words that stand for something get a value.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from support.tree import ROOT

PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md")
VALUES = {  # words that stand for something, where the parser wants more than any text
    "[--url]": "--url http://127.0.0.1:8000",
    "--gpu G": "--gpu h100",
    "--tpot-slo-ms X": "--tpot-slo-ms 50",
    "--rate R": "--rate 1",
    "...": "x",
}
_FENCE = re.compile(r"^```.*?$\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"`((?:ellm |python -m ellm\.)[^`]*)`")
_START = re.compile(r"^\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(ellm [a-z]|python3? -m ellm\.)")
_ENDS = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>"}


@dataclass(frozen=True, slots=True)
class DocCommand:
    """`name` is `ellm serve` or a module; `words` what follows it."""

    place: str
    name: str
    words: tuple[str, ...]
    whole: bool  # a command that somebody types, not the name of one in a sentence


def doc_commands() -> list[DocCommand]:
    """Each once, in the order of the documents."""
    found: dict[tuple[str, tuple[str, ...]], DocCommand] = {}
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            for command in _of_text(str(path.relative_to(ROOT)), path.read_text()):
                found.setdefault((command.name, command.words), command)
    return list(found.values())


def _of_text(place: str, text: str) -> Iterator[DocCommand]:
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            printed = re.match(r"ellm \w+:", line)  # what a command said
            if not printed and (start := _START.match(line)):
                yield from _commands(place, line[start.start(1) :], whole=True)
    for span in _SPAN.findall(_FENCE.sub("", text)):
        yield from _commands(place, " ".join(span.split()), whole=False)


def _commands(place: str, line: str, *, whole: bool) -> Iterator[DocCommand]:
    for one in _alternatives(line.replace("\\|", "|")):
        words = _words(one)
        if words[0] == "ellm":
            name, rest = " ".join(words[:2]), words[2:]
        else:
            name, rest = words[2], words[3:]
        yield DocCommand(place, name, tuple(rest), whole or bool(rest))


def _alternatives(line: str) -> list[str]:
    """`keys add|list|change` and `keys add | list | change`, as each of them."""
    choice = re.search(r"(?<= )(\w+(?: ?\| ?\w+)+)(?= )", line)
    if choice is None:
        return [line]
    return [line.replace(choice[0], one.strip()) for one in choice[0].split("|")]


def _words(line: str) -> list[str]:
    for written, meant in VALUES.items():
        line = line.replace(written, meant)
    line = re.sub(r"\[([^\]]*)\]", r"\1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)
    return words[: next((n for n, word in enumerate(words) if word in _ENDS), len(words))]
