"""Counters of many processes: merged in any order and any number of times, their sum is the same and never
falls, and a controller that starts anew learns what was shown before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.cluster.api import counters, metrics
from ellm.cluster.api.counters import CounterBook, Push
from ellm.cluster.counting import ASKED_S, SETTLE_S, CounterDesk
from ellm.worker.api import wire
from ellm.worker.api.metrics import Key
from ellm.worker.api.report import WorkerInfo, WorkerReport
from ellm.worker.api.wire import Message, WireError

A, B = ("a_total", "m"), ("b_total", "m")
INFO = WorkerInfo("w0", "e0", "m", "n", 1024, 16, 64, 1000, (0,), "cpu", "float32", True)
WORDS = st.lists(
    st.tuples(st.sampled_from(["r1", "r2", "w1"]), st.sampled_from([A, B]), st.integers(0, 99)), max_size=30
)


def book(words: list[tuple[str, Key, int]]) -> CounterBook:
    made = CounterBook()
    for source, key, value in words:
        made.merge(source, [(key, value)])
    return made


@given(WORDS, st.randoms())
def test_neither_order_nor_repetition_matters(words: list[tuple[str, Key, int]], chance) -> None:  # type: ignore[no-untyped-def]
    other = words + words[: len(words) // 2]
    chance.shuffle(other)
    assert book(words).totals() == book(other).totals()


@given(WORDS, WORDS)
def test_a_total_never_falls(words: list[tuple[str, Key, int]], more: list[tuple[str, Key, int]]) -> None:
    grown = book(words)
    before = grown.totals()
    grown.absorb(book(more).pack())
    assert all(grown.totals()[key] >= value for key, value in before.items())


@given(WORDS, WORDS, st.integers(0, 3))
def test_what_is_folded_is_counted_once(
    words: list[tuple[str, Key, int]], more: list[tuple[str, Key, int]], keep: int
) -> None:
    folded = book(words)
    before, packed = folded.totals(), folded.pack()
    folded.fold({"r2"}, keep)
    assert folded.totals() == before
    folded.absorb(packed)  # a late word
    assert folded.totals() == before
    elsewhere = book(words)
    elsewhere.absorb(folded.pack())
    assert elsewhere.totals() == before


def test_who_counts_on_is_not_folded_for_a_moment_of_silence() -> None:
    """However old it is: what was silent longest goes first."""
    kept = book([("old", A, 1), ("gone", A, 1), ("later", A, 1)])
    kept.merge("old", [(A, 2.0)])
    kept.fold((), keep=1)
    kept.merge("old", [(A, 5.0)])
    kept.merge("later", [(A, 9.0)])  # folded: a late word
    assert kept.totals() == {A: 5.0 + 1.0 + 1.0}


def push(router: str, value: float, *, wants: bool = True, whole: Message | None = None) -> Message:
    gauges = ((("g", router), value),)
    return counters.pack(Push(router, wants, whole, ((f"r-{router}", ((A, value),)),), gauges))


def test_routers_learn_of_each_other_and_of_the_dead() -> None:
    desk = CounterDesk(1, 5.0, 0.0)
    desk.exchange(push("one", 10.0, wants=False), (), {}, 0.0)
    answer = counters.unpack_answer(desk.exchange(push("two", 7.0), (), {"m": 2}, 1.0))
    mine = CounterBook()
    assert answer.book is not None
    mine.absorb(answer.book)
    assert mine.totals()[A] == 17.0
    assert dict(answer.gauges) == {
        ("g", "one"): 10.0, ("g", "two"): 7.0, (metrics.WANTED.name, "m"): 2.0, (metrics.TERM.name,): 1.0
    }  # fmt: skip
    late = counters.unpack_answer(desk.exchange(push("two", 8.0), (), {}, 9.0))
    assert ("g", "one") not in dict(late.gauges)  # it is gone
    assert late.book is not None
    mine.absorb(late.book)
    assert mine.totals()[A] == 18.0  # what it counted stays


def test_a_new_controller_is_told_what_was_shown() -> None:
    shown = book([("r-dead", A, 40), ("r-one", A, 2)])
    desk = CounterDesk(2, 5.0, 100.0)
    first = counters.unpack_answer(desk.exchange(push("one", 3.0), (), {}, 100.1))
    assert (first.term, first.complete) == (2, False)  # not all have had time to speak
    said = push("one", 3.0, whole=shown.pack())
    answer = counters.unpack_answer(desk.exchange(said, (), {}, 100.0 + SETTLE_S))
    assert answer.complete
    assert answer.book is not None
    shown.absorb(answer.book)
    assert shown.totals()[A] == 43.0


def test_workers_reports_come_with_the_answer() -> None:
    desk = CounterDesk(1, 5.0, 0.0)
    report = WorkerReport(3, generation_tokens=11, prefix_digest=b"xyz")
    answer = counters.unpack_answer(desk.exchange(push("one", 1.0), [(INFO, report, 0.2)], {}, 0.0))
    ((info, packed, age_s),) = answer.reports
    assert wire.unpack_info(info) == INFO
    assert wire.unpack_report(packed) == replace(report, prefix_digest=b"")
    assert age_s == 0.2
    mine = CounterBook()
    assert answer.book is not None
    mine.absorb(answer.book)
    assert mine.totals()["ellm_generation_tokens_total", "m"] == 11


def test_a_request_is_found_at_the_router_that_knows_it() -> None:
    desk = CounterDesk(1, 5.0, 0.0)

    def say(push: Push, now: float) -> counters.Counted:
        return counters.unpack_answer(desk.exchange(counters.pack(push), (), {}, now))

    assert say(Push("one", asks=("req-1",)), 0.0).found == ()
    assert say(Push("two"), 0.5).asked == ("req-1",)
    assert say(Push("two", finds=(("req-1", b"{}"), ("req-2", b"{}"))), 0.6).found == ()
    assert say(Push("one", asks=("req-1",)), 0.7).found == (("req-1", b"{}"),)
    assert say(Push("two"), 0.7 + ASKED_S + 0.1).asked == ()


def test_a_later_version_may_say_more() -> None:
    message = (*counters.pack(Push("one", True, None, (), (), (), ())), "new")
    assert counters.unpack_push(message) == Push("one", True)
    assert counters.unpack_answer((1, "counted", 3)) == counters.Counted(3)


@pytest.mark.parametrize("message", [(), (1, "counted", 1), (9, "counters", "r"), 3])
def test_what_is_no_word_of_a_router_is_refused(message: object) -> None:
    with pytest.raises(WireError):
        CounterDesk(1, 5.0, 0.0).exchange(message, (), {}, 0.0)  # type: ignore[arg-type]
