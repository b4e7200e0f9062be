"""Copies between device and host as a whole group sees them: each rank copies its own heads' part of a block.

A copy has ended when every rank's part has, and has failed if any part has. Each direction ends in the
order in which it was started, so numbers of ended copies say all; ranks exchange those once per step while
copies are under way, which all ranks know alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ellm.worker.engine.plan import BlockCopy, CopyTimes
from ellm.worker.executor.copies import Copier, EndedCopies
from ellm.worker.parallel.group import Group

_MICROSECOND = 1e-6


@dataclass(slots=True)
class _Direction:
    """Copies one way."""

    order: deque[int] = field(default_factory=deque)  # ids that the group still waits for, as started
    num_ended: int = 0  # here, of all ever started
    num_agreed: int = 0  # on every rank
    seconds: float = 0.0  # that copies took here
    agreed_s: float = 0.0  # of the slowest rank


class GroupCopier:
    """This rank's copier, and the others'."""

    def __init__(self, group: Group, own: Copier, block_bytes: int) -> None:
        self._group = group
        self._own = own
        self._block_bytes = block_bytes
        self._saves, self._loads = _Direction(), _Direction()
        self._is_save: dict[int, bool] = {}  # of copies that have not ended here
        self._failed_here: list[int] = []  # not yet told
        self._done: list[int] = []  # on every rank, not yet reported
        self._failed: set[int] = set()  # anywhere, not yet reported
        self._times: CopyTimes | None = None

    def start(self, saves: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> None:
        for direction, copies, is_save in ((self._saves, saves, True), (self._loads, loads, False)):
            direction.order.extend(copy.copy_id for copy in copies)
            self._is_save |= {copy.copy_id: is_save for copy in copies}
        self._own.start(saves, loads)

    def wait_next(self) -> None:
        while self._under_way and not self._done:
            self._own.wait_next()
            self._exchange()

    def wait_all(self) -> None:
        self._own.wait_all()
        while self._under_way:
            self._exchange()

    def ended(self) -> EndedCopies:
        if self._under_way:
            self._exchange()
        done, self._done = tuple(self._done), []
        failed = tuple(copy_id for copy_id in done if copy_id in self._failed)
        self._failed.difference_update(failed)
        times, self._times = self._times, None
        return EndedCopies(done, failed, times)

    def close(self) -> None:
        self._own.close()

    @property
    def _under_way(self) -> bool:
        return bool(self._saves.order or self._loads.order)

    def _exchange(self) -> None:
        """Tell how far this rank is, and learn how far all are."""
        self._collect()
        saves, loads = self._saves, self._loads
        slowest = [-int(d.seconds / _MICROSECOND) for d in (saves, loads)]
        told = [saves.num_ended, loads.num_ended, *slowest, -len(self._failed_here)]
        num_saves, num_loads, saved, loaded, num_failed = self._group.agree_least(told)
        if num_failed:
            self._tell_failures(-num_failed)
        self._advance(saves, num_saves, -saved * _MICROSECOND, save=True)
        self._advance(loads, num_loads, -loaded * _MICROSECOND, save=False)

    def _collect(self) -> None:
        """What has ended here since the last time."""
        ended = self._own.ended()
        for copy_id in ended.done:
            direction = self._saves if self._is_save.pop(copy_id) else self._loads
            direction.num_ended += 1
        self._failed_here += ended.failed
        if ended.times is not None:
            self._saves.seconds += ended.times.saved_s
            self._loads.seconds += ended.times.loaded_s

    def _tell_failures(self, most: int) -> None:
        """`most`: the largest number of failures that any rank has to tell. A rare exchange, one id of each
        rank at a time."""
        for i in range(most):
            mine = self._failed_here[i] if i < len(self._failed_here) else -1
            own = [-mine - 1 if rank == self._group.rank else 0 for rank in range(self._group.size)]
            self._failed.update(-found - 1 for found in self._group.agree_least(own) if found)
        self._failed_here.clear()

    def _advance(self, direction: _Direction, agreed: int, seconds: float, *, save: bool) -> None:
        """`agreed` copies have ended on every rank, and the slowest has spent `seconds` on all so far."""
        ended = [direction.order.popleft() for _ in range(agreed - direction.num_agreed)]
        direction.num_agreed = agreed
        if not ended:
            return
        self._done += ended
        moved = sum(copy_id not in self._failed for copy_id in ended) * self._block_bytes
        took, direction.agreed_s = seconds - direction.agreed_s, seconds
        last = self._times or CopyTimes()
        self._times = CopyTimes(
            last.saved_bytes + moved * save,
            last.saved_s + took * save,
            last.loaded_bytes + moved * (not save),
            last.loaded_s + took * (not save),
        )
