"""Copies between device and host by two CUDA streams; events say when each has ended and how long it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ellm.worker.engine.plan import BlockCopy
from ellm.worker.executor.copies import EndedCopies, EndedCopy, attempt, summary
from ellm.worker.model.host_pool import HostPool

_POLL_S = 50e-6


@dataclass(frozen=True, slots=True)
class _Open:
    copy_id: int
    failed: bool
    begin: torch.cuda.Event
    end: torch.cuda.Event

    @property
    def ended(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _Lane:
    """One direction."""

    def __init__(self, device: torch.device, *, save: bool) -> None:
        self.save = save
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.open: deque[_Open] = deque()

    def start(self, host: HostPool, copies: Sequence[BlockCopy]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for copy in copies:
                begin, end = _event(), _event()
                begin.record()
                failed = not attempt(host, copy, save=self.save)
                end.record()
                self.open.append(_Open(copy.copy_id, failed, begin, end))

    def ended(self) -> list[EndedCopy]:
        done = []
        while self.open and self.open[0].ended:
            copy = self.open.popleft()
            seconds = copy.begin.elapsed_time(copy.end) / 1e3
            done.append(EndedCopy(copy.copy_id, self.save, copy.failed, seconds))
        return done


class CudaCopier:
    """Started copies see what was queued on the current stream before them."""

    def __init__(self, host: HostPool, block_bytes: int, device: torch.device) -> None:
        self._host = host
        self._block_bytes = block_bytes
        self._lanes = (_Lane(device, save=True), _Lane(device, save=False))

    def start(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> None:
        for lane, copies in zip(self._lanes, (saves, loads), strict=True):
            if copies:
                lane.start(self._host, copies)

    def wait_next(self) -> None:
        heads = [lane.open[0] for lane in self._lanes if lane.open]
        while heads and not any(head.ended for head in heads):
            time.sleep(_POLL_S)

    def wait_all(self) -> None:
        for lane in self._lanes:
            lane.stream.synchronize()

    def ended(self) -> EndedCopies:
        ended = [copy for lane in self._lanes for copy in lane.ended()]
        return summary(ended, self._block_bytes) if ended else EndedCopies()

    def close(self) -> None:
        self.wait_all()
