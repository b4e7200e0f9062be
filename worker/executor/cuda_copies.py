"""Copies between device and host by two CUDA streams; events say when they have ended and how long they took.

Copies of one direction that start together are moved several at a time. Where that fails each is tried alone:
what is wrong with one is not the others' end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ellm.worker.engine.plan import BlockCopy
from ellm.worker.executor.copies import EndedCopies, EndedCopy, attempt, summary
from ellm.worker.executor.end_watch import EndWatch
from ellm.worker.model.cuda_host_pool import NUM_STAGED
from ellm.worker.model.host_pool import HostPool
from ellm.worker.model.staged_moves import Move

log = logging.getLogger(__name__)


class BatchedHostPool(HostPool, Protocol):
    """A host pool that moves several blocks at a time."""

    def move(self, moves: Sequence[Move], *, save: bool) -> None:
        """(block, host block) each. Raises IndexError for a wrong id."""
        ...


@dataclass(frozen=True, slots=True)
class _Open:
    copy_ids: tuple[int, ...]
    failed: bool
    begin: torch.cuda.Event
    end: torch.cuda.Event

    @property
    def ended(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.end.synchronize()


def _event() -> torch.cuda.Event:
    """Whoever waits for it sleeps."""
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class _Lane:
    """One direction."""

    def __init__(self, device: torch.device, *, save: bool) -> None:
        self.save = save
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.open: deque[_Open] = deque()
        self.watch = EndWatch("ellm-saves" if save else "ellm-loads")

    def start(self, host: BatchedHostPool, copies: Sequence[BlockCopy]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for first in range(0, len(copies), NUM_STAGED):
                part = copies[first : first + NUM_STAGED]
                if not self._move(host, part, len(part)):
                    for copy in part:
                        self._move(host, [copy], 0)

    def _move(self, host: BatchedHostPool, copies: Sequence[BlockCopy], at_once: int) -> bool:
        """Queue copies between two events; False where they failed and are to be tried one by one."""
        begin, end = _event(), _event()
        begin.record()
        moved = True
        if at_once > 1:
            try:
                host.move([(copy.block, copy.host_block) for copy in copies], save=self.save)
            except Exception:
                log.info("%d copies at once failed: one by one", at_once, exc_info=True)
                return False
        else:
            moved = attempt(host, copies[0], save=self.save)
        end.record()
        self.open.append(_Open(tuple(copy.copy_id for copy in copies), not moved, begin, end))
        return True

    def ended(self) -> list[EndedCopy]:
        done = []
        while self.open and self.open[0].ended:
            part = self.open.popleft()
            seconds = part.begin.elapsed_time(part.end) / 1e3 / len(part.copy_ids)
            done += [EndedCopy(copy_id, self.save, part.failed, seconds) for copy_id in part.copy_ids]
        return done


class CudaCopier:
    """Started copies see what was queued on the current stream before them."""

    def __init__(self, host: BatchedHostPool, block_bytes: int, device: torch.device) -> None:
        self._host = host
        self._block_bytes = block_bytes
        self._lanes = (_Lane(device, save=True), _Lane(device, save=False))

    def start(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> None:
        for lane, copies in zip(self._lanes, (saves, loads), strict=True):
            if copies:
                lane.start(self._host, copies)

    def wait_next(self) -> None:
        heads = [(lane, lane.open[0]) for lane in self._lanes if lane.open]
        if not heads or any(head.ended for _, head in heads):
            return
        if len(heads) == 1:
            heads[0][1].wait()
            return
        either = threading.Event()
        for lane, head in heads:
            lane.watch.tell(head.wait, either.set)
        either.wait()

    def wait_all(self) -> None:
        for lane in self._lanes:
            if lane.open:
                lane.open[-1].wait()

    def ended(self) -> EndedCopies:
        ended = [copy for lane in self._lanes for copy in lane.ended()]
        return summary(ended, self._block_bytes) if ended else EndedCopies()

    def close(self) -> None:
        try:
            self.wait_all()
        finally:
            for lane in self._lanes:
                lane.watch.stop()
