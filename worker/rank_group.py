"""The ranks of one worker: started in one placement group, listened to, and ended together.

Any rank's death, end, failure or silence is the group's problem, and so is work without a finished step. The
group says what is wrong; whether and when it is replaced is the supervisor's to decide. Silence is counted
ping by ping: time in which this process itself stood still says nothing about the ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ellm.worker.actor import RankStatus, rank_actor
from ellm.worker.api.actor_name import NAMESPACE, actor_name, rank_name
from ellm.worker.api.config import WorkerConfig, served_name
from ellm.worker.api.errors import ConfigError
from ellm.worker.follower_actor import follower_actor
from ellm.worker.watchdog import process_start

log = logging.getLogger(__name__)

PING_S = 2.0
PING_TIMEOUT_S = 2.5
LEASE_S = 30.0  # of a rank: so long may the supervisor be silent and alive
SILENCE_S = 10.0  # so long may a rank be silent
CONFIRM_S = 1.0  # a group that seems ill is looked at again after it
LOOK_S = 0.5  # between two looks at a group that loads
REASON_S = 3.0  # while loading, a rank's death may be the echo of another's error, which then comes so soon
GONE_S = 5.0


class Member:
    """One rank, as its pings show it."""

    def __init__(self, rank: int, handle: Any, same_node: bool) -> None:
        self.rank = rank
        self.handle = handle
        self.status: RankStatus | None = None
        self.silent_s = 0.0
        self._same_node = same_node
        self._pid_mark: tuple[int, str | None] | None = None

    @property
    def state(self) -> str:
        return "loading" if self.status is None else self.status.state

    async def ping(self, pause_s: float) -> None:
        """Renew its lease and hear how it is; `pause_s` lies between two pings."""
        asked_at = time.monotonic()
        try:
            status = await asyncio.wait_for(self.handle.renew.remote(), PING_TIMEOUT_S)
        except (RayError, TimeoutError):
            took_s = min(time.monotonic() - asked_at, PING_TIMEOUT_S)
            await asyncio.sleep(pause_s - took_s)
            self.silent_s += max(pause_s, took_s)
            return
        self.silent_s = 0.0
        self.status = status
        self.found(status.pid)

    def found(self, pid: int) -> None:
        """Its pid. On this node that is a process here, which can be ended whatever Ray can do."""
        if self._same_node and self._pid_mark is None:
            self._pid_mark = (pid, process_start(pid))

    def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)
        if self.lives:
            assert self._pid_mark is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid_mark[0], signal.SIGKILL)  # a frozen process would not read Ray's message

    @property
    def lives(self) -> bool:
        """As far as that can be seen from here."""
        if self._pid_mark is None:
            return False
        pid, mark = self._pid_mark
        return mark is not None and process_start(pid) == mark


class RankGroup:
    """Belongs to the event loop on which it is made."""

    def __init__(self, config: WorkerConfig, worker_id: str, epoch: str, resources: dict[str, float]) -> None:
        """Starts the ranks. `resources`: of each of them."""
        self.problem: str | None = None  # set once: there is no way back from it
        self._config = config
        self._name = f"worker {worker_id} ({epoch})"
        self._ended = False
        self._asked_at = time.monotonic()  # for its processes
        self._shown: dict[int, tuple[str, float]] = {}
        placement = ray.util.get_current_placement_group()
        # A group is packed on one node: the ranks can watch this very process, and their pids are their own
        # here. Without one the rank may be anywhere, and its pid here a stranger's.
        same_node = placement is not None
        name = actor_name(served_name(config.model), worker_id, epoch)
        options: dict[str, Any] = {
            "namespace": NAMESPACE,
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
        }
        watched_pid = os.getpid() if same_node else None
        self._members: list[Member] = []
        for rank in range(config.tensor_parallel_size):
            if placement is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement_group=placement, placement_group_bundle_index=rank
                )
            if rank == 0:
                made = rank_actor().options(name=name, **options)
                handle = made.remote(config, worker_id, epoch, LEASE_S, watched_pid)
            else:
                made = follower_actor().options(name=rank_name(rank, name), **options)
                handle = made.remote(config, rank, LEASE_S, watched_pid)
            self._members.append(Member(rank, handle, same_node))
        self._trouble = asyncio.Event()
        self._tasks = [asyncio.create_task(self._watch(member)) for member in self._members]
        self._tasks += [asyncio.create_task(self._ping_forever(member)) for member in self._members]

    @property
    def state(self) -> str:
        """Of rank 0, which serves."""
        return self._members[0].state

    @property
    def pids(self) -> list[int]:
        return [member.status.pid for member in self._members if member.status is not None]

    async def load(self) -> None:
        """Returns when the group serves. Raises ConfigError for a model or setting that cannot work,
        RuntimeError for any other end; no rank is left then."""
        loading: asyncio.Task[bool] = asyncio.create_task(self._load())
        troubled = asyncio.create_task(self._trouble.wait())
        listening = asyncio.create_task(self._listen_while_loading())
        await asyncio.wait([loading, troubled], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            await asyncio.wait([loading], timeout=REASON_S)
        troubled.cancel()
        listening.cancel()
        failure = await self._failure(loading)
        if failure is not None:
            await self.end()
            loading.cancel()
        await asyncio.gather(
            *(() if failure is None else (loading,)), troubled, listening, return_exceptions=True
        )
        if failure is not None:
            raise failure

    async def _listen_while_loading(self) -> None:
        """A rank that loads answers pings, from an event loop that has nothing else to do. One that spoke and
        is silent now is frozen, and those who wait for it would wait for ever. Before its first word it may
        still be on its way."""
        while True:
            await asyncio.sleep(LOOK_S)
            for member in self._members:
                if member.status is None or member.silent_s <= SILENCE_S:
                    continue
                await asyncio.sleep(CONFIRM_S)
                await member.ping(0.0)
                if member.silent_s > SILENCE_S:
                    self._fail(f"rank {member.rank} has not answered for {member.silent_s:.0f} s")
                    return

    async def _load(self) -> bool:
        first, *others = self._members
        pid, port = await first.handle.open.remote()
        pids: list[int] = [pid, *await asyncio.gather(*(m.handle.open.remote() for m in others))]
        for member, its in zip(self._members, pids, strict=True):
            member.found(its)
        self._tasks += [asyncio.create_task(self._watch_end(m, m.handle.follow.remote(port))) for m in others]
        loaded: bool = await first.handle.load.remote(tuple(pids), time.monotonic() - self._asked_at)
        await asyncio.gather(*(member.ping(0.0) for member in self._members))
        return loaded

    async def _failure(self, loading: asyncio.Task[bool]) -> Exception | None:
        """Why the group does not serve; None if it does."""
        try:
            if not loading.done():
                return RuntimeError(f"{self._name} cannot load: {self.problem}")
            if loading.result() and self.problem is None:
                return None
        except RayError as error:
            return RuntimeError(f"a rank of {self._name} died while loading: {error}")
        status = self._members[0].status
        if status is None or status.error is None:
            return RuntimeError(f"{self._name} cannot load: {self.problem or 'for an unknown reason'}")
        code, message = status.error
        return ConfigError(message) if code == ConfigError.code else RuntimeError(message)

    async def drain(self, timeout_s: float) -> bool:
        """Raises RayError where rank 0 dies meanwhile. True if nothing was cut short."""
        done: bool = await self._members[0].handle.drain.remote(timeout_s)
        return done

    async def confirmed_problem(self) -> str | None:
        """What is wrong with the group by readings that are not old: this process, or the whole machine, may
        itself have stood still since the last one."""
        if self._diagnose() is not None and self.problem is None:
            await self._ping_all()
            if self._diagnose() is not None:
                await asyncio.sleep(CONFIRM_S)
                await self._ping_all()
        problem = self._diagnose()
        if problem is not None:
            self._fail(problem)
        return problem

    def _diagnose(self) -> str | None:
        """What is wrong with the group by what is known, None if nothing is."""
        if self.problem is not None:
            return self.problem
        for member in self._members:
            if member.silent_s > min(SILENCE_S, self._config.stall_s):
                return f"rank {member.rank} has not answered for {member.silent_s:.0f} s"
            status = member.status
            if status is None or status.state == "loading":
                continue
            if status.state == "failed":
                return f"rank {member.rank} failed" + (f": {status.error[1]}" if status.error else "")
            if status.since_progress_s > self._config.stall_s:
                return f"no step finished for {status.since_progress_s:.0f} s although there is work"
            if status.since_tick_s > min(SILENCE_S, self._config.stall_s):
                return f"its data path has stood still for {status.since_tick_s:.0f} s"
            if status.drained:
                return "it was drained on request, and is to be replaced"
        return None

    async def end(self) -> None:
        """Nothing of the group is left when this returns, where it ran on this node."""
        if not self._ended:
            self._ended = True
            current = asyncio.current_task()
            for task in self._tasks:
                if task is not current:
                    task.cancel()
            for member in self._members:
                member.kill()
        deadline = time.monotonic() + GONE_S
        while any(member.lives for member in self._members) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _watch(self, member: Member) -> None:
        """Hear of a rank's death at once: a call that never returns fails with it."""
        try:
            await member.handle.exist.remote()
        except RayError as error:
            log.warning("rank %d of %s is dead: %s", member.rank, self._name, error)
            await self._lose(f"rank {member.rank} is dead")

    async def _watch_end(self, member: Member, followed: Awaitable[tuple[str, str]]) -> None:
        """Hear of the end of a follower's work at once."""
        with contextlib.suppress(RayError):  # its death is watched
            _, message = await followed
            await self._lose(f"rank {member.rank} has ended: {message}")

    async def _lose(self, problem: str) -> None:
        """The group is at its end. While it loads, the reason may be another rank's to tell."""
        serves = self.state != "loading"
        self._fail(problem)
        if serves:
            await self.end()

    def _fail(self, problem: str) -> None:
        if self.problem is None:
            self.problem = problem
            self._trouble.set()

    async def _ping_all(self) -> None:
        await asyncio.gather(*(member.ping(0.0) for member in self._members))

    async def _ping_forever(self, member: Member) -> None:
        pause_s = min(PING_S, self._config.stall_s / 4)
        while self.problem is None:
            await member.ping(pause_s)
            self._show(member)
            if member.silent_s == 0.0:
                await asyncio.sleep(pause_s)

    def _show(self, member: Member) -> None:
        status = member.status
        if status is None or status.state != "loading" or self._shown.get(member.rank) == status.progress:
            return
        self._shown[member.rank] = status.progress
        which = f" rank {member.rank}" if len(self._members) > 1 else ""
        log.info("%s%s: %s %.0f %%", self._name, which, status.progress[0], 100 * status.progress[1])
