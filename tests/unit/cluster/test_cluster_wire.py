"""Notes and guidance over the wire, of this version and of its neighbours."""

from __future__ import annotations

import pytest

from ellm.cluster.api import wire
from ellm.cluster.api.guidance import Guidance, TenantBudget, WorkerGuidance
from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.worker.api.wire import WireError

GUIDANCE = Guidance(3, 9, 5.0, 2, (WorkerGuidance("e", 0.5, 100, "ready"),), (), (b"x",))
NOTE = RouterNote("r", 4, (TenantUse("k", 1.0, None, 2.0, 3.0),), (b"p",))


def test_both_ways() -> None:
    budgets = (TenantBudget("k", 1.5, -1.0),)
    packed = wire.with_budgets(wire.pack_guidance(GUIDANCE), budgets)
    read = wire.unpack_guidance(packed)
    assert (read.workers, read.budgets, read.held_back) == (GUIDANCE.workers, budgets, (b"x",))
    assert (read.controller_term, read.seq, read.valid_s, read.num_routers) == (3, 9, 5.0, 2)
    assert wire.unpack_note(wire.pack_note(NOTE)) == NOTE


def test_the_next_version_may_add_fields() -> None:
    packed = wire.pack_guidance(GUIDANCE)
    later = (wire.VERSION + 1, *packed[1:], "new")
    later = (*later[:6], tuple((*worker, "new") for worker in later[6]), *later[7:])
    assert wire.unpack_guidance(later).workers == GUIDANCE.workers
    assert wire.unpack_note((*wire.pack_note(NOTE), 1, 2)) == NOTE


@pytest.mark.parametrize(
    "message", [None, (), (1,), (wire.VERSION + 2, "note"), (1, "guidance"), ("1", "note")]
)
def test_anything_else_is_refused(message: object) -> None:
    with pytest.raises(WireError):
        wire.unpack_note(message)  # type: ignore[arg-type]
