"""One process of the generator: sends its sessions when they are due, whatever the server does.

Waiting never depends on an answer, but for the next turn of a conversation. asyncio's own timers are a
millisecond coarse, so the loop sleeps on its epoll descriptor by `select`, whose timeout has microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import select
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ellm.loadtest.generator.content import WORDS, PromptWriter
from ellm.loadtest.generator.http_client import HttpClient
from ellm.loadtest.generator.live import Progress
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.plan import PlannedSession, PlannedTurn
from ellm.loadtest.generator.record import Record
from ellm.loadtest.generator.target import Target, request_body

PROGRESS_S = 0.5
MAX_AT_ONCE = 64  # sends without a look at what has come in
ENCODE_AHEAD_TOKENS = 30_000_000  # of prompts that are written before the start; more are written when due
_FD_SETSIZE = 1024


class PreciseSelector(selectors.EpollSelector):
    """An epoll whose timeout is not rounded up to milliseconds."""

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is not None and 0.0 < timeout < 0.1 and self.fileno() < _FD_SETSIZE:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0.0
        return super().select(timeout)


@dataclass(slots=True)
class _Running:
    """A request on its way."""

    call: Any
    record: Record


class Sender:
    """Sends one process's share. All in one thread; callbacks never wait."""

    def __init__(self, target: Target, options: Options, sessions: list[PlannedSession], client: Any) -> None:
        self._target = target
        self._options = options
        self._sessions = sessions
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._writer = PromptWriter(target.scale, target.words or WORDS)
        self._next = 0
        self._encoded: dict[int, Any] = {}
        self._running: dict[int, _Running] = {}
        self._left = len(sessions)
        self._stopped = False
        self.finished = asyncio.Event()
        self.records: list[Record] = []
        self.progress = Progress()

    def prepare(self) -> None:
        """Write the requests that can be written before the start."""
        tokens = 0
        for session in self._sessions:
            tokens += session.turns[0].prompt.tokens
            if tokens > ENCODE_AHEAD_TOKENS:
                return
            self._encoded[session.number] = self._first_request(session)

    def start(self) -> None:
        """The client's `start_s` has come, or will."""
        self._tick()
        self._loop.call_later(1.0, self._expire)
        if not self._left:
            self.finished.set()

    def stop(self) -> None:
        """Send nothing more, and end what runs."""
        self._stopped = True
        self._left = 0
        for running in list(self._running.values()):
            running.call.cancel("interrupted")
        self.finished.set()

    def _tick(self) -> None:
        sent = 0
        while self._next < len(self._sessions) and not self._stopped:
            session = self._sessions[self._next]
            wait = session.due_s - self._client.now()
            if wait > 0.0 or sent == MAX_AT_ONCE:
                self._loop.call_later(max(0.0, wait), self._tick)
                return
            self._next += 1
            sent += 1
            self._send(session, 0, session.due_s, self._encoded.pop(session.number, None), [])

    def _send(
        self, session: PlannedSession, turn: int, due_s: float, request: Any, said: list[dict[str, str]]
    ) -> None:
        planned = session.turns[turn]
        record = Record(
            planned.index, session.number, turn, due_s, planned.prompt.tokens, planned.output_tokens,
            session.warmup, prompt_tokens=planned.prompt.tokens,
        )  # fmt: skip
        if request is None and turn == 0:
            request = self._first_request(session)
        elif request is None:
            request = self._encode(planned, said)
        more = turn + 1 < len(session.turns)

        def done(record: Record) -> None:
            self._done(session, record, said if turn else self._messages(planned))

        self.progress.sent += 1
        call = self._client.send(request, record, done, more)
        if not call.ended:
            self._running[planned.index] = _Running(call, record)
            if planned.cancel_after_s is not None:
                self._loop.call_later(planned.cancel_after_s, call.cancel)

    def _done(self, session: PlannedSession, record: Record, said: list[dict[str, str]]) -> None:
        self._running.pop(record.index, None)
        self.records.append(record)
        self.progress.ended(record)
        turn = record.turn + 1
        if turn == len(session.turns) or record.outcome != "completed" or self._stopped:
            self._left -= 1
            if self._left <= 0:
                self.finished.set()
            return
        planned = session.turns[turn]
        said = [*said, {"role": "assistant", "content": record.text}, *self._messages(planned)]
        record.text = ""
        due_s = record.end_s + planned.think_s
        self._loop.call_later(planned.think_s, self._send_turn, session, turn, due_s, said)

    def _send_turn(
        self, session: PlannedSession, turn: int, due_s: float, said: list[dict[str, str]]
    ) -> None:
        if not self._stopped:
            self._send(session, turn, due_s, None, said)

    def _expire(self) -> None:
        """Requests that take too long have failed. Looked at each second: no timer per request."""
        limit = self._client.now() - self._options.timeout_s
        for running in list(self._running.values()):
            if running.record.due_s < limit:
                running.call.cancel(f"timeout: no end within {self._options.timeout_s:g} s")
        if not self.finished.is_set():
            self._loop.call_later(1.0, self._expire)

    def _first_request(self, session: PlannedSession) -> Any:
        planned = session.turns[0]
        if self._options.prompt_ids:
            return self._encode(planned, [], self._writer.ids(planned.prompt))
        return self._encode(planned, self._messages(planned))

    def _messages(self, planned: PlannedTurn) -> list[dict[str, str]]:
        system, user = self._writer.parts(planned.prompt)
        messages = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": user}]

    def _encode(
        self, planned: PlannedTurn, messages: list[dict[str, str]], ids: list[int] | None = None
    ) -> Any:
        if self._target.endpoint == "grpc":
            from ellm.loadtest.generator.grpc_client import generate_request

            return generate_request(self._target, self._options, messages, ids, planned.output_tokens)
        body = request_body(self._target, self._options, messages, planned.output_tokens)
        if ids is not None:
            body["prompt"] = ids
        return self._client.encode(body)


def run_sender(
    pipe: Connection, target: Target, options: Options, sessions: list[PlannedSession], cpu: int | None
) -> None:
    """The process's main function. Says ("ready",), waits for the start's monotonic time, says
    ("progress", Progress) twice a second and ("records", [...]) at the end; "stop" on the pipe ends it."""
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    raise_file_limit()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(PreciseSelector())) as runner:
        runner.run(_serve(pipe, target, options, sessions))


async def _serve(pipe: Connection, target: Target, options: Options, sessions: list[PlannedSession]) -> None:
    client = make_client(target, len(sessions))
    sender = Sender(target, options, sessions, client)
    sender.prepare()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection is a pause in which nothing is sent
    pipe.send(("ready",))
    start_s = await asyncio.to_thread(pipe.recv)
    if start_s is None:
        return
    loop = asyncio.get_running_loop()
    client.start_s = start_s
    loop.add_reader(pipe.fileno(), _on_message(pipe, sender))
    sender.start()
    while not sender.finished.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sender.finished.wait(), PROGRESS_S)
        pipe.send(("progress", sender.progress.take(time.process_time())))
    loop.remove_reader(pipe.fileno())
    await asyncio.sleep(0.05)  # calls that were cancelled end
    await client.close()
    pipe.send(("records", sender.records))


def _on_message(pipe: Connection, sender: Sender) -> Callable[[], None]:
    def read() -> None:
        try:
            pipe.recv()
        except EOFError:
            asyncio.get_running_loop().remove_reader(pipe.fileno())
        sender.stop()

    return read


def make_client(target: Target, sessions: int) -> Any:
    """HttpClient or GrpcClient: the same calls."""
    if target.endpoint == "grpc":
        from ellm.loadtest.generator.grpc_client import GrpcClient

        return GrpcClient(target, sessions)
    return HttpClient(target)


def raise_file_limit() -> None:
    """As many open connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
