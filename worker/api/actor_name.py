"""How a worker is found without asking anybody: the name of its rank 0 actor, in a namespace of our own."""

from __future__ import annotations

NAMESPACE = "ellm"
PREFIX = "ellm-worker:"


def actor_name(model: str, worker_id: str, epoch: str) -> str:
    """`ellm-worker:MODEL:WORKER:EPOCH`; only the model may hold colons."""
    assert ":" not in worker_id + epoch
    return f"{PREFIX}{model}:{worker_id}:{epoch}"


def epoch_of(name: str, model: str | None = None) -> str | None:
    """The epoch in an actor's name; None for an actor of another kind, or of another model than `model`."""
    if not name.startswith(PREFIX):
        return None
    served, _, epoch = name[len(PREFIX) :].rsplit(":", 2)
    return epoch if model is None or served == model else None
