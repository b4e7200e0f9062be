"""The scale-up benchmark: phases add up, and what it looks for is what the server says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.router_server import EchoWorker, RouterServer

from ellm.cluster.api.metrics import WANTED
from ellm.loadtest.chaos_client import Answer, Template
from ellm.loadtest.scale_up import Cycle, parse, rows_of, words_of
from ellm.loadtest.scale_up_watch import Load, Outside, first_token_of, when
from ellm.loadtest.served import Started

START_S = {"process": 3.0, "importing torch": 2.0, "loading weights": 1.0, "warming up": 4.0}


def a_cycle() -> Cycle:
    return Cycle(
        loaded_at=100.0, decided_at=103.0, supervisor_at=104.0, found_at=115.0, first_token_at=115.25,
        idle_at=120.0, down_at=131.0, gone_at=132.5, start_s=START_S,
    )  # fmt: skip


def test_phases_add_up_to_the_way_from_the_decision_to_the_first_token() -> None:
    phases = a_cycle().phases()
    names = list(phases)
    whole = names.index("from the decision to the first token")
    assert sum(phases[name] for name in names[1:whole]) == pytest.approx(phases[names[whole]]) == 12.25
    assert phases["weights"] == 1.0
    assert phases["until a router has found it"] == pytest.approx(1.0)
    assert phases["from the decision until it has gone"] == 1.5


def test_a_row_has_the_median_and_what_the_first_worker_took() -> None:
    other = a_cycle()
    other.decided_at = 102.0
    rows = {row["phase"]: row for row in rows_of("m", {"loading weights": 0.5}, [a_cycle(), other])}
    first = rows["load until the controller decides"]
    assert (first["s"], first["least"], first["most"], first["first worker, s"]) == (2.5, 2.0, 3.0, None)
    assert rows["weights"]["first worker, s"] == 0.5


def test_the_command_is_one_that_ellm_serve_takes() -> None:
    from ellm.deploy import cli, config
    from ellm.deploy.tree import validate
    from ellm.loadtest.scale_up import BUNDLED

    command, *words = words_of(BUNDLED, parse([]))
    args = cli.parser(command).parse_args([command, *words])
    loaded = config.load(None, settings=args.settings, flags={"workers": args.workers, "port": args.port})
    validate(loaded.config)
    (model,) = loaded.config.served
    assert (model.min_workers, model.num_workers, model.max_workers) == (1, 1, 2)


class Page(Outside):
    """One whose pages are given."""

    def __init__(self, **pages: str) -> None:
        super().__init__(Started(1, "http://127.0.0.1:1", 0.0))
        self.pages = pages

    def get(self, path: str) -> bytes:
        return self.pages[path.rpartition("/")[2]].encode()


def test_how_many_are_wanted_is_read_from_the_metrics() -> None:
    text = f'# HELP {WANTED.name} Workers.\n{WANTED.name}{{model_name="m"}} 2\n{WANTED.name}_more 7\n'
    assert Page(metrics=text).wanted() == 2
    assert Page(metrics="").wanted() == 0


def test_the_first_answer_of_a_worker_is_the_earliest_that_is_its_alone() -> None:
    def shown(worker: str, moves: int = 0) -> str:
        return json.dumps({"choices": [{"worker": worker, "num_moves": moves}]})

    def answer(first_at: float) -> Answer:
        made = Answer(0, 0.0, done=True, reasons=["length"])
        made.first_at = first_at
        return made

    load = Load("127.0.0.1", 1, [Template({})], 1)
    load.answers = {"a": answer(5.0), "b": answer(6.0), "c": answer(7.0), "d": answer(8.0), "e": answer(9.0)}
    outside = Page(a=shown("w1"), b=shown("w0"), c=shown("w1", moves=1), d=shown("w1"), e=shown("w1"))
    assert first_token_of("w1", outside, load, since=5.5) == 8.0
    assert first_token_of("w2", outside, load, since=0.0) == 0.0


def test_a_router_tells_which_worker_answered_a_stream() -> None:
    body: dict[str, Any] = {"prompt": "a b c", "max_tokens": 4, "ignore_eos": True, "stream": True}
    with RouterServer([EchoWorker(0)]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        outside = Outside(Started(1, server.url, 0.0))
        load = Load(host, int(port), [Template(body)], 2)
        with load:
            when("answers", lambda: len(load.answers) > 4)
        assert [row["id"] for row in outside.workers()] == ["w0"]
        assert {outside.worker_of(name) for name in load.answers} == {"w0"}
        assert outside.worker_of("unknown") is None
        assert all(answer.whole for answer in load.answers.values())
