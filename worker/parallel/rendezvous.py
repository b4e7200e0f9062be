"""Where the ranks of a group meet before they are connected: a store in rank 0's process.

It also carries the last words of a rank that fails, for as long as rank 0 lives. The store has no password:
it listens on the group's own address alone. Knows nothing of what the ranks compute.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ellm.worker.api.errors import ConfigError, EllmError

# torch exports these names, but its types do not say so.
_distributed: Any = dist

POLL_S = 0.02
_REPORT_S = 5.0
_LISTEN_S = 0.2
_CONNECT_S = 60.0  # ranks that are all there connect to each other within it


class GroupFailed(RuntimeError):
    """A rank failed, died or stood still: the group is at its end. The message says which, where known."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a rank waits for others, in seconds."""

    start_s: float = 600.0  # to come, to load, to warm up
    step_s: float = 30.0  # within a step; and for a sign of life of rank 0 between steps
    heartbeat_s: float = 1.0  # between rank 0's signs of life


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank of a group, and where the group meets."""

    rank: int
    size: int
    host: str = "127.0.0.1"
    port: int = 0
    timeouts: Timeouts = Timeouts()


class Rendezvous:
    """Where a group meets: a store in rank 0's process. Keep it for as long as the group lives."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.port: int = store.port

    @staticmethod
    def listen(host: str = "127.0.0.1", port: int = 0) -> Rendezvous:
        """Open the store on `host` alone; port 0 takes a free one. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((host, port))
            bound = listener.getsockname()[1]
        except OSError:
            listener.close()
            raise
        # The store listens on this socket, and closes it.
        store = _distributed.TCPStore(
            host,
            bound,
            None,
            True,
            timedelta(seconds=_CONNECT_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return Rendezvous(store)


def report_death(spec: RankSpec, rank: int, reason: str) -> None:
    """Tell a group that is not ready yet that `rank` will not come. From any process; no error if the group
    is gone itself."""
    with contextlib.suppress(RuntimeError, OSError):
        socket.create_connection((spec.host, spec.port), _REPORT_S).close()  # a client would try for long
        write_failure(_client(spec, _REPORT_S), rank, GroupFailed(reason))


def meet(spec: RankSpec, rendezvous: Rendezvous | None) -> Any:
    """Wait until every rank is here; the store. Raises GroupFailed, or ConfigError where a rank failed so."""
    start = time.monotonic()
    if spec.rank == 0:
        rendezvous = rendezvous or Rendezvous.listen(spec.host, spec.port)
        store = rendezvous.store
    else:
        store = _joined(spec)
    store.set(f"here/{spec.rank}", b"1")
    everyone = [f"here/{rank}" for rank in range(spec.size)]
    while not _has(store, everyone):
        if (failure := read_failure(store, spec)) is not None:
            raise failure
        if time.monotonic() - start > spec.timeouts.start_s:
            missing = [str(r) for r in range(spec.size) if not _has(store, [f"here/{r}"])]
            raise GroupFailed(f"rank {', '.join(missing)} did not come within {spec.timeouts.start_s} s")
        time.sleep(POLL_S)
    return store


def connect(spec: RankSpec, store: Any) -> Any:
    """The gloo group of ranks that have met."""
    options = _distributed.ProcessGroupGloo._Options()
    options._devices = [_distributed.ProcessGroupGloo.create_device(hostname=spec.host)]
    options._timeout = timedelta(seconds=spec.timeouts.start_s)
    try:
        return _distributed.ProcessGroupGloo(
            _distributed.PrefixStore("gloo", store), spec.rank, spec.size, options
        )
    except RuntimeError as error:
        failure = None
        with contextlib.suppress(RuntimeError):
            failure = read_failure(store, spec)
        raise failure or GroupFailed(f"rank {spec.rank} cannot reach the others: {error}") from None


class Listener:
    """Hears what ranks fail with, for a rank that waits for something else. It has a connection of its own:
    if rank 0's process stands still, so does whoever asks the store."""

    def __init__(self, spec: RankSpec) -> None:
        self.heard: EllmError | GroupFailed | None = None
        self._spec = spec
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="ellm-group-listener", daemon=True).start()

    def stop(self) -> None:
        """Soon; nobody waits for it."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            store = _client(self._spec, _CONNECT_S)
            while self.heard is None and not self._stopped.wait(_LISTEN_S):
                self.heard = read_failure(store, self._spec)
        except RuntimeError:
            self.heard = GroupFailed("rank 0 is gone")


def write_failure(store: Any, rank: int, error: BaseException) -> None:
    """Why `rank` gives up. Raises RuntimeError where the store is gone."""
    message = error.message if isinstance(error, EllmError) else str(error) or repr(error)
    param = error.param if isinstance(error, EllmError) else None
    store.set(f"error/{rank}", json.dumps([isinstance(error, ConfigError), message, param]))


def read_failure(store: Any, spec: RankSpec) -> EllmError | GroupFailed | None:
    """What another rank has failed with. Raises RuntimeError where the store is gone."""
    for rank in range(spec.size):
        if rank != spec.rank and _has(store, [f"error/{rank}"]):
            is_config, message, param = json.loads(store.get(f"error/{rank}"))
            if is_config:
                return ConfigError(f"rank {rank}: {message}", param=param)
            return GroupFailed(f"rank {rank}: {message}")
    return None


def _client(spec: RankSpec, timeout_s: float) -> Any:
    return _distributed.TCPStore(
        spec.host, spec.port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
    )


def _joined(spec: RankSpec) -> Any:
    """Connected to the store of rank 0, which may not be there yet."""
    try:
        store = _client(spec, spec.timeouts.start_s)
    except RuntimeError as error:
        raise GroupFailed(f"rank 0 is not at {spec.host}:{spec.port}: {error}") from None
    store.set_timeout(timedelta(seconds=_CONNECT_S))
    return store


def _has(store: Any, keys: Sequence[str]) -> bool:
    there: bool = store.check(list(keys))
    return there
