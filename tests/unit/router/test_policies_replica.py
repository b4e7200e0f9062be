"""What a router knows of a worker: the report, and exactly what it has sent since."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ellm.router.policies import Replica
from ellm.worker.api.report import WorkerReport


def report(*seen: tuple[str, int], **changes: int) -> WorkerReport:
    return WorkerReport(seq=1, last_submit_seq=seen, **changes)  # type: ignore[arg-type]


def test_what_a_report_counts_is_not_counted_twice() -> None:
    replica = Replica("w")
    for seq in (1, 2, 3):
        replica.place(seq, 100 * seq, 110 * seq)
        replica.sent(seq, seq, 100 * seq, 110 * seq, float(seq))
    replica.heard(report(("me", 2), ("other", 7), num_running=2, num_parked=1), "me", 4.0)
    assert (replica.num_unseen, replica.unseen_rows, replica.unseen_tokens) == (3, 300, 330)
    assert replica.num_requests == 3 + 3
    replica.heard(report(("me", 3)), "me", 4.1)
    assert (replica.num_unseen, replica.unseen_rows, replica.unseen_tokens) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 500), st.booleans()), max_size=30), st.data())
def test_the_correction_is_exact(sends: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    """In whatever order things are sent, dropped and reported."""
    replica, seq, out = Replica("w"), 0, []
    for num, tokens, dropped in sends:
        replica.place(num, tokens, tokens)
        if dropped:
            replica.withdraw(num, tokens, tokens)
            continue
        seq += 1
        replica.sent(seq, num, tokens, tokens, 0.0)
        out.append((num, tokens))
        seen = data.draw(st.integers(0, seq))
        replica.heard(report(("me", seen)), "me", 0.0)
        out = out[max(0, seen - (seq - len(out))) :]
        assert replica.num_unseen == sum(num for num, _ in out)
        assert replica.unseen_tokens == sum(tokens for _, tokens in out)


def test_a_report_is_as_old_as_what_it_does_not_know() -> None:
    replica = Replica("w")
    replica.place(1, 10, 10)
    replica.sent(1, 1, 10, 10, 1.0)
    replica.heard(report(("me", 0)), "me", 2.0)
    assert replica.known_since == 1.0
    replica.heard(report(("me", 1)), "me", 3.0)
    assert replica.known_since == 3.0


def test_others_are_counted_by_their_submissions() -> None:
    replica = Replica("w")
    for tick in range(100):
        replica.heard(report(("me", 5 * tick), ("a", tick), ("b", 2 * tick)), "me", 0.1 * tick)
    assert replica.foreign_rate == pytest.approx(30.0, rel=0.01)
    replica.heard(report(("a", 99)), "me", 10.0)  # b has left
    replica.heard(report(("a", 99)), "me", 9.0)  # the clock jumps
    assert 0.0 <= replica.foreign_rate <= 30.1
