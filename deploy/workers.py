"""What the workers' ranks say of themselves: how far they have loaded, and how they sized their KV pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ellm.worker.api.actor_name import NAMESPACE, is_rank

ANSWER_S = 1.0


def ranks() -> list[Any]:
    """Handles of the rank actors there are."""
    import ray
    from ray.util import list_named_actors

    handles = []
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and is_rank(actor["name"]):
            try:
                handles.append(ray.get_actor(actor["name"], NAMESPACE))
            except ValueError:  # gone since
                continue
    return handles


def progress() -> str:
    """One text for all ranks: "2 x loading weights 40 %"."""
    found = ask(ranks(), "status")
    texts = Counter(
        "ready" if status.state != "loading" else f"{status.progress[0]}{_percent(status.progress[1])}"
        for status in found
    )
    return ", ".join(f"{count} x {text}" if len(found) > 1 else text for text, count in texts.items())


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


def pool_lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the KV pools were sized, from the router's table of workers: one line each, or one for all."""
    kinds = {tuple(row[name] for name in ("device", "dtype", "num_blocks", "block_size")) for row in table}
    if len(kinds) == 1 and len(table) > 1:
        return [f"each worker: {describe_pool(table[0])}"]
    return [f"{row['id']}: {describe_pool(row)}" for row in table]


def describe_pool(row: Mapping[str, Any]) -> str:
    tokens = row["num_blocks"] * row["block_size"]
    parts = ", ".join(f"{what} {_bytes(size)}" for what, size in row["memory"].items())
    sized = f" ({parts})" if parts else ""
    return f"{row['dtype']} on {row['device']}, KV pool {row['num_blocks']} blocks = {tokens:,} tokens{sized}"


def _percent(share: float) -> str:
    return f" {100 * share:.0f} %" if 0 < share < 1 else ""


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
