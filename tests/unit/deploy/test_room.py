"""What does not fit on the cluster is said before anything is placed."""

from __future__ import annotations

import pytest

from ellm.cluster.api.view import NodeView
from ellm.deploy.config import from_mapping
from ellm.deploy.room import problems
from ellm.deploy.tree import EllmConfig


def config(**more: object) -> EllmConfig:
    return from_mapping({"model": "simulated:", "address": "auto", **more})


@pytest.mark.parametrize(
    ("tree", "nodes", "expected"),
    [
        (config(workers=2), [NodeView("a", 4, 0)], []),
        (config(workers=9), [NodeView("a", 4, 0)], ["simulated: 8 of 9 workers fit on 1 node"]),
        (config(workers=2, cluster={"worker_num_cpus": 0.0}), [], []),
        (
            config(workers=1, device="cuda"),
            [NodeView("a", 4, 0)],
            ["simulated: a worker needs 1 GPUs on one node, and the largest node has 0"],
        ),
        (
            config(workers=1, tp=8, cluster={"worker_num_cpus": 1.0}),
            [NodeView("a", 4, 0), NodeView("b", 4, 0)],
            ["simulated: a worker needs 8 CPUs on one node, and the largest node has 4"],
        ),
    ],
)
def test_a_group_goes_to_one_node(tree: EllmConfig, nodes: list[NodeView], expected: list[str]) -> None:
    assert problems(tree, nodes) == expected
