"""What a release's routers and controller say to each other: as support/wire_release.py for workers.

PYTHONPATH=tests .venv/bin/python tests/support/controller_release.py 1.0 > tests/unit/cluster/wire/1.0.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

import msgpack
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
    return {cls.__name__: [field.name for field in fields(cls)] for cls in CLASSES}


def main() -> None:
    release = {
        "release": sys.argv[1],
        "version": wire.VERSION,
        "schema": schema(),
        "messages": {kind: msgpack.packb(message).hex() for kind, message in messages().items()},
    }
    sys.stdout.write(json.dumps(release, indent=1) + "\n")


if __name__ == "__main__":
    main()
