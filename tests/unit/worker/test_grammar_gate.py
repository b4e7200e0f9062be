"""Requests with a grammar: compiled before they enter the engine, beside others that do not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.workers import HeldExecutor, make_engine, request, wait_until, worker_config

from ellm.worker.api.errors import InvalidRequest
from ellm.worker.api.output import SequenceOutput
from ellm.worker.api.request import EngineRequest


class Compiler:
    """Compiles nothing, when told to."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.seen: list[str] = []

    def compile(self, grammar: str) -> object:
        self.seen.append(grammar)
        assert self.may_go_on.wait(30)
        if grammar == "bad":
            raise InvalidRequest("no grammar", param="grammar")
        if grammar == "crash":
            raise RuntimeError("internals")
        return grammar


def constrained(name: str, grammar: str) -> EngineRequest:
    plain = request(name, max_tokens=3)
    return replace(plain, sampling=replace(plain.sampling, grammar=grammar))


class Started:
    def __init__(self, compiler: Compiler | None) -> None:
        self.outputs: list[SequenceOutput] = []
        self.compiler = compiler
        _, self.loop = make_engine(HeldExecutor(0.0), worker_config(), grammars=compiler)
        self.loop.start(self.outputs.extend)

    def ends(self) -> dict[str, str | None]:
        return {o.request_id: o.finish_reason for o in self.outputs if o.finish_reason}


@pytest.fixture
def started() -> Iterator[Started]:
    made = Started(Compiler())
    yield made
    assert made.compiler is not None
    made.compiler.may_go_on.set()
    made.loop.stop(10)


def error_of(outputs: list[SequenceOutput], name: str) -> tuple[str, str] | None:
    return next(o.error for o in outputs if o.request_id == name)


def test_nobody_waits_for_anothers_grammar(started: Started) -> None:
    loop, compiler = started.loop, started.compiler
    assert compiler is not None
    loop.submit("router", 0, [constrained("slow", "good"), request("free", 3)])
    wait_until(lambda: started.ends() == {"free": "length"}, 60)
    assert compiler.seen == ["good"]
    compiler.may_go_on.set()
    wait_until(lambda: started.ends() == {"free": "length", "slow": "length"}, 60)


def test_one_that_is_aborted_meanwhile_never_runs(started: Started) -> None:
    loop, compiler = started.loop, started.compiler
    assert compiler is not None
    loop.submit("router", 0, [constrained("gone", "good"), constrained("stays", "other")])
    wait_until(lambda: compiler.seen == ["good"], 60)
    loop.abort([("gone", 0)])
    compiler.may_go_on.set()
    wait_until(lambda: started.ends() == {"stays": "length"}, 60)
    assert all(output.request_id == "stays" for output in started.outputs)


def test_what_does_not_compile_is_refused_alone(started: Started) -> None:
    loop, compiler = started.loop, started.compiler
    assert compiler is not None
    compiler.may_go_on.set()
    loop.submit("router", 0, [constrained(name, name) for name in ("bad", "crash", "good")])
    wait_until(lambda: len(started.ends()) == 3, 60)
    assert started.ends() == {"bad": "error", "crash": "error", "good": "length"}
    assert error_of(started.outputs, "bad") == ("invalid_value", "no grammar")
    code, message = error_of(started.outputs, "crash") or ("", "")
    assert code == "invalid_value"
    assert "internals" not in message


def test_an_engine_without_grammars_refuses_them() -> None:
    """It would answer as if nothing had been asked."""
    made = Started(None)
    made.loop.submit("router", 0, [constrained("a", "good")])
    wait_until(lambda: made.ends() == {"a": "error"}, 60)
    assert error_of(made.outputs, "a") == ("invalid_value", "this worker obeys no grammars")
    made.loop.stop(10)
