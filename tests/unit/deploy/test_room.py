"""What does not fit on the cluster is said before anything is placed."""

from __future__ import annotations

import pytest

from ellm.cluster.api.view import NodeView
from ellm.deploy import server
from ellm.deploy.config import from_mapping
from ellm.deploy.progress import Progress
from ellm.deploy.room import problems
from ellm.deploy.tree import EllmConfig
from ellm.worker.api.errors import ConfigError

MORE = "m: 0 of 2 workers fit on 1 node"


def config(**more: object) -> EllmConfig:
    return from_mapping({"model": "m", "address": "auto", **more})


@pytest.mark.parametrize(
    ("tree", "nodes", "expected"),
    [
        (config(workers=2), [NodeView("a", 4, 0)], []),
        (config(workers=9), [NodeView("a", 4, 0)], ["m: 6 of 9 workers fit on 1 node"]),
        (config(workers=2, routers=3), [NodeView("a", 2, 0)], ["router: 2 of 3 routers fit on 1 node", MORE]),
        (config(workers=2, cluster={"worker_num_cpus": 0.0}), [NodeView("a", 1, 0)], []),
        (
            config(workers=1, device="cuda"),
            [NodeView("a", 4, 0)],
            ["m: a worker needs 1 GPUs on one node, and the largest node has 0"],
        ),
        (
            config(workers=1, tp=8, cluster={"worker_num_cpus": 1.0}),
            [NodeView("a", 4, 0), NodeView("b", 4, 0)],
            ["m: a worker needs 8 CPUs on one node, and the largest node has 4"],
        ),
    ],
)
def test_a_group_goes_to_one_node(tree: EllmConfig, nodes: list[NodeView], expected: list[str]) -> None:
    assert problems(tree, nodes) == expected


def models(*entries: dict[str, object]) -> EllmConfig:
    return from_mapping({"cluster": {"worker_num_cpus": 1.0}, "models": list(entries)})


def test_all_models_are_placed_together() -> None:
    tree = models({"model": "a", "workers": 2}, {"model": "b", "workers": 2})
    assert problems(tree, [NodeView("n", 5, 0)]) == []
    assert problems(tree, [NodeView("n", 4, 0)]) == ["b: 1 of 2 workers fit on 1 node"]


def test_one_model_that_is_too_large_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.room, "nodes", lambda: [NodeView("n", 5, 0)])
    server.check_room(models({"model": "a", "workers": 2}, {"model": "b", "tp": 8, "workers": 1}), Progress())
    assert "b: a worker needs 8 CPUs on one node, and the largest node has 5" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="needs 8 CPUs"):
        server.check_room(models({"model": "b", "tp": 8, "workers": 1}), Progress())


def test_routers_are_among_the_cpus_that_are_asked_for() -> None:
    tree = from_mapping({"model": "m", "workers": 1, "max_workers": 3, "tp": 2, "routers": 2})
    assert server.needed_cpus(tree) == 2 + 3 * 2 * 0.5
