"""Which node a tensor-parallel group goes to: a whole group on one node, groups spread over nodes. Pure.

Ray places the groups (one placement group each, STRICT_PACK); this says beforehand whether they fit, and how
many more would, by the same rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ellm.cluster.api.view import NodeView


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """What all ranks of one group need together."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True)
class Placement:
    nodes: tuple[str, ...]  # of the groups that fit, one each
    reason: str = ""  # why not all do

    @property
    def count(self) -> int:
        return len(self.nodes)


def place_groups(nodes: Sequence[NodeView], need: GroupNeed, count: int) -> Placement:
    """Place up to `count` groups, each on the node with the fewest, and of those the one with most left."""
    assert need.num_cpus > 0 or need.num_gpus > 0
    left = {node.node: [node.num_cpus, node.num_gpus] for node in nodes}
    held = dict.fromkeys(left, 0)
    placed: list[str] = []
    while len(placed) < count:
        fitting = [n for n, (cpus, gpus) in left.items() if cpus >= need.num_cpus and gpus >= need.num_gpus]
        if not fitting:
            return Placement(tuple(placed), _reason(nodes, need, len(placed), count))
        node = min(fitting, key=lambda n: (held[n], -left[n][1], -left[n][0], n))
        left[node][0] -= need.num_cpus
        left[node][1] -= need.num_gpus
        held[node] += 1
        placed.append(node)
    return Placement(tuple(placed))


def _reason(nodes: Sequence[NodeView], need: GroupNeed, placed: int, count: int) -> str:
    gpus, cpus = max((n.num_gpus for n in nodes), default=0), max((n.num_cpus for n in nodes), default=0)
    if need.num_gpus > gpus:
        return f"a worker needs {need.num_gpus:g} GPUs on one node, and the largest node has {gpus:g}"
    if need.num_cpus > cpus:
        return f"a worker needs {need.num_cpus:g} CPUs on one node, and the largest node has {cpus:g}"
    return f"{placed} of {count} workers fit on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
