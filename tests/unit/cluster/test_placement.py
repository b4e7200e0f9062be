"""Groups on nodes: whole, spread, and refused with the reason."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ellm.cluster.api.view import NodeView
from ellm.cluster.placement import GroupNeed, place_groups

NODES = [NodeView("a", 8, 4), NodeView("b", 8, 4), NodeView("c", 8, 2)]


def test_groups_are_spread() -> None:
    placed = place_groups(NODES, GroupNeed(1, 2), 4)
    assert Counter(placed.nodes) == {"a": 2, "b": 1, "c": 1}
    assert placed.reason == ""


def test_a_group_larger_than_every_node_is_refused_with_the_reason() -> None:
    placed = place_groups(NODES, GroupNeed(8, 8), 1)
    assert placed.count == 0
    assert placed.reason == "a worker needs 8 GPUs on one node, and the largest node has 4"
    assert "16 CPUs" in place_groups(NODES, GroupNeed(16, 0), 1).reason
    assert place_groups([], GroupNeed(1, 0), 1).count == 0


def test_what_does_not_fit_any_more_is_said() -> None:
    assert place_groups(NODES, GroupNeed(1, 4), 5).reason == "2 of 5 workers fit on 3 nodes"


@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 8)), max_size=6),
    st.integers(1, 8), st.integers(0, 8), st.integers(0, 20),
)  # fmt: skip
def test_no_node_holds_more_than_it_has(
    sizes: list[tuple[int, int]], cpus: int, gpus: int, count: int
) -> None:
    nodes = [NodeView(str(i), *size) for i, size in enumerate(sizes)]
    placed = place_groups(nodes, GroupNeed(cpus, gpus), count)
    held = Counter(placed.nodes)
    for node in nodes:
        assert held[node.node] * cpus <= node.num_cpus
        assert held[node.node] * gpus <= node.num_gpus
    room = sum(min(n.num_cpus // cpus, n.num_gpus // gpus if gpus else 99) for n in nodes)
    assert placed.count == min(count, room)
