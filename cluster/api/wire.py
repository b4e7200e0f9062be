"""Notes and guidance as plain tuples with a schema version: builtins only, and fields are only ever added at
the end, as in worker/api/wire.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

from ellm.cluster.api.guidance import Guidance, TenantBudget, WorkerGuidance
from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.worker.api.wire import Message, WireError

VERSION = 1
_WORKERS, _BUDGETS = 4, 5  # places in Guidance
_USES = 2  # place in RouterNote


def pack_note(note: RouterNote) -> Message:
    uses = tuple(_values(use) for use in note.uses)
    return (VERSION, "note", note.router_id, note.seq, uses, note.held_back)


def unpack_note(message: Sequence[Any]) -> RouterNote:
    """Raises WireError."""
    values = _check(message, "note")
    values[_USES] = tuple(_make(TenantUse, use) for use in values[_USES])
    note: RouterNote = _make(RouterNote, values)
    return note


def pack_guidance(guidance: Guidance) -> Message:
    """Without its budgets, which differ from router to router: see `with_budgets`."""
    workers = tuple(_values(worker) for worker in guidance.workers)
    return (
        *(VERSION, "guidance", guidance.controller_term, guidance.seq, guidance.valid_s),
        *(guidance.num_routers, workers, (), guidance.held_back),
    )


def with_budgets(message: Message, budgets: Sequence[TenantBudget]) -> Message:
    place = 2 + _BUDGETS
    return (*message[:place], tuple(_values(budget) for budget in budgets), *message[place + 1 :])


def unpack_guidance(message: Sequence[Any]) -> Guidance:
    """Raises WireError."""
    values = _check(message, "guidance")
    values[_WORKERS] = tuple(_make(WorkerGuidance, worker) for worker in values[_WORKERS])
    values[_BUDGETS] = tuple(_make(TenantBudget, budget) for budget in values[_BUDGETS])
    guidance: Guidance = _make(Guidance, values)
    return replace(guidance, held_back=tuple(guidance.held_back))


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls))


def _values(obj: Any) -> tuple[Any, ...]:
    return tuple([getattr(obj, name) for name in _names(obj.__class__)])


def _make(cls: Any, values: Sequence[Any]) -> Any:
    return cls(*values[: len(_names(cls))])


def _check(message: Sequence[Any], kind: str) -> list[Any]:
    if not isinstance(message, tuple) or len(message) < 2:
        raise WireError("not a wire message")
    if not isinstance(message[0], int) or abs(message[0] - VERSION) > 1:
        raise WireError(f"wire version {message[0]!r}, this side speaks {VERSION}")
    if message[1] != kind:
        raise WireError(f"expected {kind!r}, got {message[1]!r}")
    return list(message[2:])
