"""What the controller wants done. Its body carries it out; none of it can end a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ellm.cluster.api.guidance import Guidance, TenantBudget


@dataclass(frozen=True, slots=True)
class Advise:
    """Have this ready for every router that asks; `budgets` by router id, for each its own."""

    guidance: Guidance
    budgets: Mapping[str, tuple[TenantBudget, ...]]


@dataclass(frozen=True, slots=True)
class Scale:
    """From now on the model should have so many workers."""

    model: str
    num_workers: int
    reason: str


@dataclass(frozen=True, slots=True)
class Distrust:
    """A worker that says it is ready gets nothing new, and why. Whether it ends, its supervisor decides."""

    worker_id: str
    epoch: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resign:
    """A later controller is there: end."""

    newest_term: int


Action = Advise | Scale | Distrust | Resign
