"""How a worker is found without asking anybody: the name of its rank 0 actor, in a namespace of our own."""

from __future__ import annotations

NAMESPACE = "ellm"
PREFIX = "ellm-worker:"
RANK_PREFIX = "ellm-rank:"


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


def rank_name(rank: int, worker: str) -> str:
    """The name of a further rank of the group whose rank 0 is named `worker`. Routers do not look for it."""
    assert rank > 0
    return f"{RANK_PREFIX}{rank}:{worker.removeprefix(PREFIX)}"


def is_rank(name: str) -> bool:
    """Whether an actor of this name is a rank of some worker, rank 0 included."""
    return name.startswith((PREFIX, RANK_PREFIX))


def worker_id_of(name: str) -> str | None:
    """The worker id in a rank 0's name; None for any other."""
    return name.rsplit(":", 2)[1] if epoch_of(name) is not None else None
