"""Counters of many processes as one sum that never runs backwards.

Every incarnation of a router or worker is a source that counts upwards from 0. Books are merged by taking the
larger number of each source, so they may come late, twice, or in any order; a total is the sum over all
sources, those that are gone included. Sources that went long ago are folded into one number; their names are
kept, so that a late word of one is not counted again. Only the controller folds: of two books that have, the
one that has folded more often knows what the other has folded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ellm.worker.api.metrics import Key
from ellm.worker.api.wire import Message, WireError

VERSION = 1
MAX_GONE = 512  # sources that are gone and kept apart
MAX_FOLDED = 8192  # names

Series = Mapping[Key, float]


def router_source(router_id: str) -> str:
    return f"r-{router_id}"


def worker_source(epoch: str) -> str:
    return f"w-{epoch}"


class CounterBook:
    def __init__(self) -> None:
        self._sources: dict[str, dict[Key, float]] = {}
        self._folded: dict[Key, float] = {}
        self._names: dict[str, None] = {}  # of those that were folded
        self._num_folds = 0

    def __len__(self) -> int:
        return len(self._sources)

    def merge(self, source: str, counts: Iterable[tuple[Key, float]]) -> None:
        """Take what a source has counted; what is known already, or more than that, stays."""
        if source in self._names:
            return
        known, grown = self._sources.setdefault(source, {}), False
        for key, value in counts:
            if value > known.get(key, 0.0):
                known[key] = value
                grown = True
        if grown:  # what is silent longest comes first
            self._sources[source] = self._sources.pop(source)

    def totals(self) -> dict[Key, float]:
        """Over all sources."""
        found = dict(self._folded)
        for counts in self._sources.values():
            for key, value in counts.items():
                found[key] = found.get(key, 0.0) + value
        return found

    def fold(self, alive: Collection[str], keep: int = MAX_GONE) -> None:
        """Of the sources that are not `alive`, fold all but the `keep` that counted last: what fell silent
        for a moment is among these."""
        gone = [source for source in self._sources if source not in alive]
        for source in gone[: max(0, len(gone) - keep)]:
            for key, value in self._sources.pop(source).items():
                self._folded[key] = self._folded.get(key, 0.0) + value
            self._names[source] = None
            self._num_folds += 1
        while len(self._names) > MAX_FOLDED:
            del self._names[next(iter(self._names))]

    def pack(self) -> Message:
        """All of it, as builtins."""
        sources = tuple((source, tuple(counts.items())) for source, counts in self._sources.items())
        return self._num_folds, tuple(self._names), tuple(self._folded.items()), sources

    def absorb(self, packed: Sequence[Any]) -> None:
        """Merge another book."""
        num_folds, names, folded, sources = packed[:4]
        if num_folds > self._num_folds:
            self._num_folds, self._names, self._folded = num_folds, dict.fromkeys(names), dict(folded)
            for source in self._names:
                self._sources.pop(source, None)
        for source, counts in sources:
            self.merge(source, counts)


@dataclass(frozen=True, slots=True)
class Push:
    """A router's word, in builtins. New fields come at the end."""

    router_id: str
    wants: bool = False  # the answer with all that there is
    book: Message | None = None  # all that it knows, for a controller that has just started
    counts: Message = ()  # what has changed: (source, ((key, value), ...)) pairs
    gauges: Message = ()  # (key, value) pairs that hold now
    asks: tuple[str, ...] = ()  # requests that it does not know, by id
    finds: Message = ()  # (id, timeline as JSON) of those that others ask for


@dataclass(frozen=True, slots=True)
class Counted:
    """The controller's answer."""

    term: int
    complete: bool = True  # all routers have had time to say what they know
    book: Message | None = None
    gauges: Message = ()  # of all routers, and its own
    reports: Message = ()  # (packed info, packed report, age in seconds) of every worker that it hears
    asked: tuple[str, ...] = ()  # requests that somebody looks for
    found: Message = ()  # (id, timeline as JSON) of those that this router asks for


_KINDS: dict[type[Push] | type[Counted], str] = {Push: "counters", Counted: "counted"}


def pack(word: Push | Counted) -> Message:
    values = tuple(getattr(word, item.name) for item in fields(word))
    return (VERSION, _KINDS[type(word)], *values)


def unpack_push(message: Sequence[Any]) -> Push:
    """Raises WireError."""
    return Push(*_check(message, Push))


def unpack_answer(message: Sequence[Any]) -> Counted:
    """Raises WireError."""
    return Counted(*_check(message, Counted))


def _check(message: Sequence[Any], cls: type[Push] | type[Counted]) -> list[Any]:
    """The values of as many fields as it has."""
    if not isinstance(message, tuple) or len(message) < 3:
        raise WireError("not a message of counters")
    if not isinstance(message[0], int) or abs(message[0] - VERSION) > 1:
        raise WireError(f"wire version {message[0]!r}, this side speaks {VERSION}")
    if message[1] != _KINDS[cls]:
        raise WireError(f"expected {_KINDS[cls]!r}, got {message[1]!r}")
    return list(message[2 : 2 + len(fields(cls))])
