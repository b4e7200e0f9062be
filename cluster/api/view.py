"""What the controller sees at a tick: the newest word of each worker and router, as its body has it.

Nothing here is checked: reports may be old, doubled or of an incarnation that is gone. The brain sorts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.report import WorkerInfo, WorkerReport


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One incarnation of one worker."""

    info: WorkerInfo
    report: WorkerReport | None  # the one that came last; None before the first
    num_heard: int  # messages from it so far: silence is a number that does not grow


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one router's clients of one API key ask for, refused requests included. Rates per second."""

    tenant: str
    max_requests_per_s: float | None  # of the key, over all routers; None: no limit
    max_tokens_per_s: float | None
    requests_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class RouterNote:
    """What a router says of itself, about once a second."""

    router_id: str
    seq: int
    uses: tuple[TenantUse, ...] = ()
    held_back: tuple[bytes, ...] = ()  # all prompts that are held back because workers died on them here


@dataclass(frozen=True, slots=True)
class RouterView:
    note: RouterNote
    num_heard: int


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a node has in all, free or not."""

    node: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class View:
    workers: tuple[WorkerView, ...] = ()
    routers: tuple[RouterView, ...] = ()
    newest_term: int = 0  # of any controller that was ever started
