"""What the controller tells routers, once per tick: advice that a router can do without.

Durations only: a router stamps what it receives and lets it age. A router without guidance, or with guidance
older than `valid_s`, weighs all workers alike and lends itself limit / N of each tenant's rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ellm.worker.api.report import WorkerState


@dataclass(frozen=True, slots=True)
class WorkerGuidance:
    """One worker incarnation as the controller sees it."""

    epoch: str
    weight: float = 1.0  # relative share of new requests; 0: send nothing new
    admit_tokens: int = -1  # prompt tokens that all routers together may send it until the next tick; -1: any
    state: WorkerState = "ready"
    of: int = 0  # workers of its model; 0: not said


@dataclass(frozen=True, slots=True)
class TenantBudget:
    """What one router may spend for a tenant until the next guidance, at most one second's worth."""

    tenant: str
    requests: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Guidance:
    """One tick's word to one router. Newer means: higher (controller_term, seq)."""

    controller_term: int  # of the controller's incarnation: a later controller has a higher one
    seq: int
    valid_s: float
    num_routers: int  # 0: not known yet
    workers: tuple[WorkerGuidance, ...] = ()
    budgets: tuple[TenantBudget, ...] = ()
    held_back: tuple[bytes, ...] = ()  # digests of prompts on which workers died
