"""Copies of blocks between device and host, beside the steps: each direction on its own, in the order given.

Decides nothing: which blocks, and that nobody touches them meanwhile, is the brain's business. A copy that
fails is reported and takes nothing else with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ellm.worker.engine.plan import BlockCopy, CopyTimes
from ellm.worker.model.host_pool import HostPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndedCopies:
    """What has ended since it was last asked for, in the order in which it ended."""

    done: tuple[int, ...] = ()  # copy ids, those of failed ones too
    failed: tuple[int, ...] = ()
    times: CopyTimes | None = None


class Copier(Protocol):
    """One per executor with a host tier; all calls from the thread that executes."""

    def start(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> None:
        """Queue copies behind those under way. Everything computed so far is part of what they see."""
        ...

    def wait_next(self) -> None:
        """Until a copy has ended that was not yet reported; at once if none is under way."""
        ...

    def wait_all(self) -> None:
        """Until all have ended."""
        ...

    def ended(self) -> EndedCopies:
        """Each copy once."""
        ...

    def close(self) -> None:
        """Wait for what is under way. No call may follow."""
        ...


@dataclass(frozen=True, slots=True)
class EndedCopy:
    """One copy, and the seconds that it took."""

    copy_id: int
    save: bool
    failed: bool
    seconds: float


class ThreadCopier:
    """Copies made by a thread for each direction."""

    def __init__(self, host: HostPool, block_bytes: int) -> None:
        self._host = host
        self._block_bytes = block_bytes
        self._save_thread = ThreadPoolExecutor(1, "kv-save")
        self._load_thread = ThreadPoolExecutor(1, "kv-load")
        self._changed = threading.Condition()
        self._ended: list[EndedCopy] = []  # not yet reported
        self._num_open = 0  # started and not yet ended

    def start(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> None:
        with self._changed:
            self._num_open += len(saves) + len(loads)
        if saves:
            self._save_thread.submit(self._copy, saves, save=True)
        if loads:
            self._load_thread.submit(self._copy, loads, save=False)

    def wait_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._num_open)

    def wait_all(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)

    def ended(self) -> EndedCopies:
        with self._changed:
            ended, self._ended = self._ended, []
        return summary(ended, self._block_bytes) if ended else EndedCopies()

    def close(self) -> None:
        self._save_thread.shutdown()
        self._load_thread.shutdown()

    def _copy(self, copies: Sequence[BlockCopy], *, save: bool) -> None:
        for copy in copies:
            start = time.perf_counter()
            failed = not attempt(self._host, copy, save=save)
            ended = EndedCopy(copy.copy_id, save, failed, time.perf_counter() - start)
            with self._changed:
                self._ended.append(ended)
                self._num_open -= 1
                self._changed.notify_all()


def attempt(host: HostPool, copy: BlockCopy, *, save: bool) -> bool:
    """Make one copy. Whatever goes wrong in it is this copy's end and nobody else's."""
    try:
        if save:
            host.save(copy.block, copy.host_block)
        else:
            host.load(copy.host_block, copy.block)
    except Exception:
        log.exception("copy %d failed: block %d, host block %d", copy.copy_id, copy.block, copy.host_block)
        return False
    return True


def summary(ended: Sequence[EndedCopy], block_bytes: int) -> EndedCopies:
    """Failed copies moved nothing, and their time says nothing of the link."""
    saves = [e.seconds for e in ended if e.save and not e.failed]
    loads = [e.seconds for e in ended if not e.save and not e.failed]
    times = CopyTimes(len(saves) * block_bytes, sum(saves), len(loads) * block_bytes, sum(loads))
    return EndedCopies(tuple(e.copy_id for e in ended), tuple(e.copy_id for e in ended if e.failed), times)
