"""Whether routers and workers of a configuration fit on the nodes there are, before anything is placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ellm.cluster.api.view import NodeView
from ellm.cluster.placement import GroupNeed, place_groups
from ellm.deploy.tree import EllmConfig, ServedModel
from ellm.router.config import ROUTER_CPUS


def nodes() -> list[NodeView]:
    """Of the Ray cluster that this process has joined, with all that they have."""
    import ray

    found = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [NodeView(name, has.get("CPU", 0.0), has.get("GPU", 0.0)) for name, has in found]


def group_need(config: EllmConfig, model: ServedModel) -> GroupNeed:
    """What one worker of the model asks Ray for."""
    ranks = model.worker.tensor_parallel_size
    on_gpu = model.worker.model.device == "cuda"
    return GroupNeed(ranks * config.cluster.worker_num_cpus, ranks if on_gpu else 0)


def problems(config: EllmConfig, there: Sequence[NodeView]) -> list[str]:
    """What does not fit when the routers and all models share the nodes: a line for each, with the reason."""
    router = GroupNeed(ROUTER_CPUS, 0)
    needs = [("router", router, config.router.num_replicas)]
    needs += [(model.name, group_need(config, model), model.num_workers) for model in config.served]
    lines, left = [], there
    for name, need, count in needs:
        if not need.num_cpus and not need.num_gpus:
            continue  # placed anywhere
        placed = place_groups(left, need, count)
        left = _without(left, need, placed.nodes)
        if placed.count < count:
            what = "routers" if need is router else "workers"
            some = (
                f"{placed.count} of {count} {what} fit on {len(there)} node{'s' if len(there) != 1 else ''}"
            )
            too_large = "" if need is router else place_groups(there, need, 1).reason
            lines.append(f"{name}: {too_large or some}")
    return lines


def _without(nodes: Sequence[NodeView], need: GroupNeed, taken: Sequence[str]) -> list[NodeView]:
    """What is left when the named nodes hold a group each, a node as often as it is named."""
    held = Counter(taken)
    return [
        replace(
            node,
            num_cpus=node.num_cpus - held[node.node] * need.num_cpus,
            num_gpus=node.num_gpus - held[node.node] * need.num_gpus,
        )
        for node in nodes
    ]
