"""Finds the first stop string in a text that comes in pieces, and holds back what may become one.

The match is the one that is complete first, and of those the longest: so the result does not depend on how
the text is cut into pieces. All stop strings are matched at once by an Aho-Corasick automaton; the depth of
its state is the length of the longest end of the text that begins a stop string: just what must be held back.
State lives in the router, so a request that moves to another worker keeps it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of one request; shared by its choices."""

    __slots__ = ("depth", "fail", "first", "longest", "next")

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings)
        self.next: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.longest = [0]  # length of the longest stop string that ends in this state
        for string in strings:
            self._insert(string)
        self._link()
        self.first = frozenset(self.next[0])

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            following = self.next[state].get(char)
            if following is None:
                following = len(self.next)
                self.next[state][char] = following
                self.next.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest.append(0)
            state = following
        self.longest[state] = len(string)

    def _link(self) -> None:
        """Breadth first: a state falls back to the longest shorter prefix that its text ends with."""
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self.next[state].items():
                queue.append(following)
                self.fail[following] = self.step(self.fail[state], char)
                self.longest[following] = max(self.longest[following], self.longest[self.fail[following]])

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while True:
            following = self.next[state].get(char)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fail[state]


class StopMatcher:
    """One sequence's text. After `matched` is set the text has ended."""

    __slots__ = ("_held", "_include", "_state", "_strings", "matched")

    def __init__(self, strings: StopStrings, include: bool = False) -> None:
        """`include`: the stop string itself stays in the text."""
        self._strings = strings
        self._include = include
        self._state = 0
        self._held = ""
        self.matched = False

    @property
    def num_held(self) -> int:
        """Characters held back."""
        return len(self._held)

    def push(self, text: str) -> str:
        """Add text; returns what can be shown of all that was held back and added."""
        assert not self.matched
        strings, state = self._strings, self._state
        if not state and strings.first.isdisjoint(text):
            return text
        held = self._held + text
        for i, char in enumerate(text, len(self._held) + 1):
            state = strings.step(state, char)
            if strings.longest[state]:
                self.matched = True
                self._held = ""
                return held[:i] if self._include else held[: i - strings.longest[state]]
        self._state = state
        shown = len(held) - strings.depth[state]
        self._held = held[shown:]
        return held[:shown]

    def skip(self, text: str) -> str:
        """Add text in which no stop string counts (before `min_tokens`)."""
        assert not self.matched
        shown, self._held, self._state = self._held + text, "", 0
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text without a match."""
        held, self._held = self._held, ""
        return held
