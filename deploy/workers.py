"""What the workers' ranks say of themselves: how far they have loaded, and how they sized their KV pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ellm.worker.api import wire
from ellm.worker.api.actor_name import NAMESPACE, epoch_of
from ellm.worker.api.report import WorkerInfo

ANSWER_S = 1.0


def ranks() -> list[Any]:
    """Handles of the rank actors there are."""
    import ray
    from ray.util import list_named_actors

    handles = []
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and epoch_of(actor["name"]) is not None:
            try:
                handles.append(ray.get_actor(actor["name"], NAMESPACE))
            except ValueError:  # gone since
                continue
    return handles


def progress() -> str:
    """One text for all ranks: "2 x loading weights 40 %"."""
    found = ask(ranks(), "renew")
    texts = Counter(
        "ready" if status.state != "loading" else f"{status.progress[0]}{_percent(status.progress[1])}"
        for status in found
    )
    return ", ".join(f"{count} x {text}" if len(found) > 1 else text for text, count in texts.items())


def infos() -> list[WorkerInfo]:
    """Of the ranks that have loaded, by worker id."""
    found = [wire.unpack_info(packed) for packed in ask(ranks(), "describe") if packed is not None]
    return sorted(found, key=lambda info: info.worker_id)


def ask(handles: Sequence[Any], method: str) -> list[Any]:
    """The answers of those that answer in time."""
    import ray
    from ray.exceptions import RayError

    refs = [getattr(handle, method).remote() for handle in handles]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S) if refs else ([], [])
    answers = []
    for ref in done:
        try:
            answers.append(ray.get(ref))
        except RayError:
            continue
    return answers


def pool_lines(found: Sequence[WorkerInfo]) -> list[str]:
    """How the KV pools were sized, one line per worker (one for all where they are alike)."""
    texts = Counter(describe_pool(info) for info in found)
    if len(texts) == 1 and len(found) > 1:
        return [f"each worker: {next(iter(texts))}"]
    return [f"{info.worker_id}: {describe_pool(info)}" for info in found]


def describe_pool(info: WorkerInfo) -> str:
    tokens = info.num_blocks * info.block_size
    parts = ", ".join(f"{what} {_bytes(size)}" for what, size in info.memory)
    sized = f" ({parts})" if parts else ""
    return f"{info.dtype} on {info.device}, KV pool {info.num_blocks} blocks = {tokens:,} tokens{sized}"


def _percent(share: float) -> str:
    return f" {100 * share:.0f} %" if 0 < share < 1 else ""


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
