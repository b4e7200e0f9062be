"""Whether the workers of a configuration fit on the nodes there are, before anything is placed."""

from __future__ import annotations

from collections.abc import Sequence

from ellm.cluster.api.view import NodeView
from ellm.cluster.placement import GroupNeed, place_groups
from ellm.deploy.tree import EllmConfig, ServedModel


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
    """What does not fit, each model for itself: one line for each, with the reason."""
    lines = []
    for model in config.served:
        need = group_need(config, model)
        if not need.num_cpus and not need.num_gpus:
            continue  # placed anywhere
        reason = place_groups(there, need, model.num_workers).reason
        if reason:
            lines.append(f"{model.name}: {reason}")
    return lines
