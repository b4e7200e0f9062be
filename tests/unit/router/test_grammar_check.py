"""How long a router looks at a grammar, and how many may wait for that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from ellm.router import grammar_check
from ellm.router.grammar_check import MAX_PENDING, GrammarCheck
from ellm.router.tokenizer import Tokenizer
from ellm.worker.api.errors import InvalidRequest, QueueFull
from ellm.worker.api.grammar import MAX_GRAMMAR_BYTES


@pytest.fixture
def held(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GrammarCheck]:
    """One that comes to no verdict before the test ends."""
    released = threading.Event()
    check = GrammarCheck(tokenizer)

    def verdict(_: str) -> str:
        assert released.wait(60)
        return ""

    monkeypatch.setattr(check, "_verdict", verdict)
    monkeypatch.setattr(grammar_check, "COMPILE_S", 0.2)
    yield check
    released.set()


def test_a_grammar_that_takes_too_long_is_refused_by_its_field(held: GrammarCheck) -> None:
    begun = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"guided_regex: takes longer than 0\.2 s to compile") as caught:
        asyncio.run(held.check("{}", "guided_regex"))
    assert caught.value.param == "guided_regex"
    assert time.monotonic() - begun < 20


def test_beyond_so_many_that_wait_the_router_is_full(held: GrammarCheck) -> None:
    async def all_at_once() -> list[BaseException | None]:
        checks = (held.check(f'{{"n": {i}}}', "guided_json") for i in range(MAX_PENDING + 3))
        return await asyncio.gather(*checks, return_exceptions=True)

    found = asyncio.run(all_at_once())
    assert sum(isinstance(error, QueueFull) for error in found) == 3
    assert sum(isinstance(error, InvalidRequest) for error in found) == MAX_PENDING


def test_a_grammar_beyond_its_size_is_not_looked_at(held: GrammarCheck) -> None:
    with pytest.raises(InvalidRequest, match="more than"):
        asyncio.run(held.check("x" * (MAX_GRAMMAR_BYTES + 1), "guided_grammar"))
