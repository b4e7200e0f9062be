"""The first complete stop string ends the text, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ellm.router.stop_strings import StopMatcher, StopStrings

SMALL = st.text("ab.é", min_size=0, max_size=30)
STOPS = st.lists(st.text("ab.é", min_size=1, max_size=4), min_size=1, max_size=4)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Look at every beginning of the text until one ends with a stop string; the longest one counts."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end if include else end - max(map(len, ending))], True
    return text, False


def run(text: str, stops: list[str], cuts: list[int], include: bool) -> tuple[str, bool, list[str]]:
    matcher = StopMatcher(StopStrings(stops), include)
    shown, at, turn = [], 0, 0
    while at < len(text) and not matcher.matched:
        step = cuts[turn % len(cuts)]
        shown.append(matcher.push(text[at : at + step]))
        at, turn = at + step, turn + 1
    if not matcher.matched:
        shown.append(matcher.flush())
    return "".join(shown), matcher.matched, shown


@given(SMALL, STOPS, CUTS, st.booleans())
@example("abcd", ["abcd", "bc"], [4], False)
@example("aab", ["ab", "aab", "b"], [1], False)
def test_it_finds_what_a_search_of_the_whole_text_finds(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    found, matched, _ = run(text, stops, cuts, include)
    assert (found, matched) == oracle(text, stops, include)


@given(SMALL, STOPS, CUTS)
def test_nothing_shown_is_taken_back_and_no_more_is_held_than_needed(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(StopStrings(stops))
    shown, at, turn = "", 0, 0
    while at < len(text):
        step = cuts[turn % len(cuts)]
        shown += matcher.push(text[at : at + step])
        at, turn = min(at + step, len(text)), turn + 1
        if matcher.matched:
            return
        read = text[:at]
        # Held: the longest end of what was read that begins a stop string.
        needed = max(n for n in range(len(read) + 1) if n == 0 or any(s.startswith(read[-n:]) for s in stops))
        assert matcher.num_held == needed
        assert shown == read[: len(read) - needed]


def test_the_prefix_of_a_stop_string_is_held_and_let_go() -> None:
    matcher = StopMatcher(StopStrings(["</end>"]))
    assert matcher.push("text</e") == "text"
    assert matcher.push("nx") == "</enx"
    assert matcher.push("</en") == ""
    assert matcher.push("d>more") == ""
    assert matcher.matched


def test_what_is_held_comes_out_at_the_end() -> None:
    matcher = StopMatcher(StopStrings(["STOP"]))
    assert matcher.push("a STO") == "a "
    assert matcher.flush() == "STO"
    assert matcher.flush() == ""


def test_skipped_text_stops_nothing() -> None:
    matcher = StopMatcher(StopStrings(["ab"]))
    assert matcher.push("xa") == "x"
    assert matcher.skip("b") == "ab"
    assert matcher.push("b") == "b"
    assert not matcher.matched


def test_no_stop_string_is_empty() -> None:
    with pytest.raises(AssertionError):
        StopStrings([""])


def test_many_long_stop_strings_are_built_and_matched_quickly() -> None:
    stops = ["a" * 1023 + chr(ord("b") + i) for i in range(16)]
    matcher = StopMatcher(StopStrings(stops))
    assert matcher.push("a" * 5000) == "a" * (5000 - 1023)
    assert matcher.push("z") == "a" * 1023 + "z"
