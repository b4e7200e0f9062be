"""What a release's routers and controller say to each other: as support/wire_release.py for workers.

PYTHONPATH=tests .venv/bin/python tests/support/controller_release.py 1.0 > tests/unit/cluster/wire/1.0.json
"""

from __future__ import annotations

import sys
from typing import Any

from support import wire_release
from support.wire_release import sample

from ellm.cluster.api import wire
from ellm.cluster.api.guidance import Guidance, TenantBudget, WorkerGuidance
from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.worker.api.wire import Message

CLASSES = (RouterNote, TenantUse, Guidance, WorkerGuidance, TenantBudget)


def samples() -> dict[str, Any]:
    """Kind -> what its message holds."""
    guidance = sample(
        Guidance,
        workers=(sample(WorkerGuidance, state="draining"), sample(WorkerGuidance, epoch="e", state="ready")),
        budgets=(sample(TenantBudget),),
        held_back=(b"one", b"two"),
    )
    note = sample(RouterNote, uses=(sample(TenantUse), sample(TenantUse, tenant="t")), held_back=(b"three",))
    return {"note": note, "guidance": guidance}


def messages() -> dict[str, Message]:
    """Kind -> a message of it."""
    objects = samples()
    guidance = objects["guidance"]
    return {
        "note": wire.pack_note(objects["note"]),
        "guidance": wire.with_budgets(wire.pack_guidance(guidance), guidance.budgets),
    }


def schema() -> dict[str, list[str]]:
    """Class -> its fields in order."""
    return wire_release.schema(CLASSES)


if __name__ == "__main__":
    wire_release.write_release(sys.argv[1], wire.VERSION, schema(), messages())
