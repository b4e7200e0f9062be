"""The controller's advice at a router: asked for once a second, followed while it is young, and never needed.

Advice sets the weight and the admission budget in what policies see of each worker. Without any, or when it
has grown old, all workers weigh alike, no budget holds, and each API key's rate is lent at limit / N. What
the controller says counts by (term, seq): a later controller wins, and nothing is taken twice: a budget that
was spent is not there again before the next word. A note says all that the router holds back, so that one
that is lost, or a controller that starts anew, loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from typing import Protocol

from ellm.cluster.api import wire
from ellm.cluster.api.guidance import Guidance, TenantBudget, WorkerGuidance
from ellm.cluster.api.view import RouterNote, TenantUse
from ellm.router.failover import MAX_POISON, PoisonList
from ellm.router.link import WorkerLink
from ellm.router.subset import ALL_UP_TO, CHOSEN
from ellm.worker.api.wire import Message

log = logging.getLogger(__name__)

PERIOD_S = 1.0
ANSWER_S = 2.0
CHECK_S = 0.25  # how late it may be noticed that advice has lapsed
AWAY = "controller_away"  # it was asked and did not answer
LAPSED = "guidance_lapsed"  # what it said last is too old to be followed


class ControllerLine(Protocol):
    """A router's way to the controller."""

    async def exchange(self, note: Message) -> Message | None:
        """The newest guidance for a note; None before there is any. Raises whatever its transport raises."""
        ...


@dataclass(frozen=True, slots=True)
class Heard:
    """For `/metrics` and `/admin`."""

    seen: bool  # advice is being followed
    age_s: float | None
    term: int


class GuidanceBook:
    """The newest advice, and whether it still holds. Time is an argument."""

    def __init__(self, num_routers: int = 1) -> None:
        """`num_routers` is believed until a controller knows better."""
        self.fallbacks: Counter[str] = Counter()
        self.num_routers = num_routers
        self.told = 0  # routers, by a controller's word; 0 before there was any
        self._guidance: Guidance | None = None
        self._heard_at = 0.0
        self._workers: dict[str, WorkerGuidance] = {}
        self._budgets: dict[str, TenantBudget] = {}
        self._follows = False
        self._granted: set[str] = set()  # epochs whose budget was handed out since the last word

    def take(self, guidance: Guidance, now: float) -> bool:
        """False for advice that is not newer than what is known."""
        known = self._guidance
        if known is not None and (guidance.controller_term, guidance.seq) <= (
            known.controller_term,
            known.seq,
        ):
            return False
        self._guidance, self._heard_at, self._follows = guidance, now, True
        self._workers = {worker.epoch: worker for worker in guidance.workers}
        self._budgets = {budget.tenant: budget for budget in guidance.budgets}
        self._granted.clear()
        self.told = guidance.num_routers or self.told
        self.num_routers = self.told or self.num_routers
        return True

    def check(self, now: float) -> bool:
        """Whether advice is followed. When it begins to be too old, that is counted once."""
        if self._follows and self._guidance is not None and now - self._heard_at > self._guidance.valid_s:
            self._follows = False
            self._workers.clear()
            self._budgets.clear()
            self.fallbacks[LAPSED] += 1
        return self._follows

    def apply(self, links: Iterable[WorkerLink]) -> None:
        """Write the advice into what policies see; a worker that it does not name weighs 1."""
        for link in links:
            word = self._workers.get(link.info.epoch)
            link.replica.weight = 1.0 if word is None else word.weight
            if word is None or word.admit_tokens < 0:
                link.replica.admit_tokens = inf
            elif word.epoch not in self._granted:
                self._granted.add(word.epoch)
                link.replica.admit_tokens = word.admit_tokens / users(self.num_routers, word.of)

    def budget(self, tenant: str) -> TenantBudget | None:
        """What this router may spend per second for a key; None: limit / N."""
        return self._budgets.get(tenant)

    @property
    def held_back(self) -> tuple[bytes, ...]:
        return () if self._guidance is None or not self._follows else self._guidance.held_back

    def heard(self, now: float) -> Heard:
        if self._guidance is None:
            return Heard(False, None, 0)
        return Heard(self._follows, max(0.0, now - self._heard_at), self._guidance.controller_term)


def users(num_routers: int, num_workers: int) -> float:
    """How many routers use one of a model's workers: all, or where there are very many workers its part."""
    return num_routers if num_workers <= ALL_UP_TO else max(1.0, num_routers * CHOSEN / num_workers)


def tag(model: str) -> bytes:
    """Stands before what is held back, so that one model's prompts are not refused by another."""
    return blake2b(model.encode(), digest_size=8).digest()


class GuidanceLoop:
    """Asks, and hands out what it hears. Owned by the router's app; `start` and `close` on its event loop."""

    def __init__(
        self,
        book: GuidanceBook,
        line: ControllerLine | None,
        links: Callable[[], Iterable[WorkerLink]],
        uses: Callable[[], tuple[TenantUse, ...]] = tuple,
        prompts: Callable[[], Mapping[str, PoisonList]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prompts`: what is held back of each model."""
        self.router_id = uuid.uuid4().hex[:12]
        self._book = book
        self._line = line
        self._links = links
        self._uses = uses
        self._prompts = prompts
        self._clock = clock
        self._seq = 0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if self._line is not None:
            self._tasks.append(asyncio.create_task(self._ask_forever(self._line)))
            self._tasks.append(asyncio.create_task(self._check_forever()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask_forever(self, line: ControllerLine) -> None:
        while True:
            try:
                await self._ask(line)
            except Exception as error:  # a router needs no controller, whatever becomes of it
                log.debug("no word of the controller: %r", error)
                self._book.fallbacks[AWAY] += 1
            self._apply()
            await asyncio.sleep(PERIOD_S)

    async def _check_forever(self) -> None:
        """Beside an exchange that may take its time: what has lapsed is not followed until that ends."""
        while True:
            await asyncio.sleep(CHECK_S)
            self._apply()

    def _apply(self) -> None:
        self._book.check(self._clock())
        self._book.apply(self._links())

    async def _ask(self, line: ControllerLine) -> None:
        self._seq += 1
        held_back = self._own_prompts()
        note = RouterNote(self.router_id, self._seq, self._uses(), held_back)
        answer = await asyncio.wait_for(line.exchange(wire.pack_note(note)), ANSWER_S)
        if answer is None:
            return
        now = self._clock()
        if self._book.take(wire.unpack_guidance(answer), now):
            for model, prompts in self._prompts().items():
                mark = tag(model)
                ours = [word[len(mark) :] for word in self._book.held_back if word.startswith(mark)]
                prompts.learn(ours, now)

    def _own_prompts(self) -> tuple[bytes, ...]:
        now = self._clock()
        own = [
            tag(model) + digest for model, prompts in self._prompts().items() for digest in prompts.own(now)
        ]
        return tuple(own[-MAX_POISON:])
