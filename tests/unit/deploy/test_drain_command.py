"""`ellm drain`: a worker or a node, never both; what it waits for on a node is what serves there."""

from __future__ import annotations

import pytest
from ray._private import state

from ellm.deploy import cli, node_drain


@pytest.mark.parametrize("words", [[], ["w0", "--node", "here"]])
def test_it_wants_a_worker_or_a_node(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drain", *words]) == 2
    assert "name a worker, or a node" in capsys.readouterr().err


def test_a_node_is_empty_when_no_replica_lives_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def actor(name: str, node: str) -> dict[str, object]:
        return {"Name": name, "Address": {"NodeID": node}}

    actors = [
        actor("SERVE_REPLICA::ellm#Router#abc", "n1"),
        actor("SERVE_REPLICA::ellm#Worker#def", "n2"),
        actor("SERVE_PROXY_ACTOR-n1", "n1"),  # stays as long as the node
        actor("ellm-worker:m:w0:e", "n1"),  # ends with its supervisor
    ]
    asked: list[str] = []

    def all_actors(actor_state_name: str) -> dict[str, dict[str, object]]:
        asked.append(actor_state_name)
        return {str(number): item for number, item in enumerate(actors)}

    monkeypatch.setattr(state, "actors", all_actors)
    assert node_drain.replicas("n1") == {"SERVE_REPLICA::ellm#Router#abc"}
    assert node_drain.replicas("n3") == frozenset()
    assert set(asked) == {"ALIVE"}
