"""A group of ranks: who they are, how they find each other, and that they end together.

Rank 0 drives: it is an Executor (executor/tensor_parallel.py), plans come to it, and it tells the others what
to compute. The others decide nothing (parallel/follower.py). Whatever happens to one of them ends the group:
a rank that fails, dies or stands still makes every other rank raise `GroupFailed` within `Timeouts.step_s`
(within `start_s` before the group is ready), and no rank is of any use afterwards. A group is never mended.

What whoever starts the ranks (a supervisor, or parallel/local_group.py) must do:

1. Call `check_sharding` (worker/model/shard.py) first: it refuses a size that the model cannot have.
2. Start one process for each rank, all on one machine. Process 0: `rendezvous = Rendezvous.listen(host)`, on
   an address that the others reach; it is open from then on and tells its `port`.
3. In each process make `RankSpec(rank, size, host, port, timeouts)` with that port.
   Rank 0: `load_engine(config, progress, spec=spec, rendezvous=rendezvous)` (worker/build.py), which returns
   the usual LoadedEngine, and raises ConfigError or GroupFailed with the reason of whichever rank failed.
   Others: `run_follower(config, spec, progress)`, which blocks: it loads, computes, and returns when rank 0
   closes its executor; it raises whenever the group has failed. Its process must then end.
   `num_threads` of the config are those of one rank.
4. If a process dies before the group is ready, call `report_death(spec, rank, reason)` from anywhere, so that
   the others need not wait for `start_s`. Later deaths are noticed by the ranks themselves.
5. When rank 0 raises, or any process is gone: end all processes (SIGKILL; one may be stopped), then start a
   new group with a new rendezvous.

The store and the ranks' connections have no password: they listen on `host` alone, with ports of the system's
choice. It imports no Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ellm.worker.api.errors import EllmError
from ellm.worker.executor.base import BegunStep
from ellm.worker.executor.end_watch import EndWatch
from ellm.worker.parallel import rendezvous as meeting
from ellm.worker.parallel.rendezvous import GroupFailed, RankSpec, Rendezvous, Timeouts, report_death

__all__ = ["Group", "GroupFailed", "RankSpec", "Rendezvous", "Timeouts", "report_death"]

_REASON_S = 1.0  # how long a failing peer's reason is waited for
_LOOK_EVERY = timedelta(seconds=0.2)  # for failures of others, while a collective takes its time
_STILL_RUNNING = "Operation timed out!"  # torch's words for a wait that ends before the work does
_FRAME_BYTES = 1 << 14  # sent at once; what is longer takes a second message


class Work(Protocol):
    """A collective under way."""

    def wait(self, timeout: timedelta) -> object: ...


class Group:
    """This rank's membership. One thread at a time; every rank calls the same methods in the same order.
    All raise GroupFailed, or ConfigError where a rank failed with one."""

    def __init__(self, spec: RankSpec, store: Any, gloo: Any) -> None:
        """See `join`."""
        self.spec = spec
        self._store = store
        self._gloo: Any = gloo
        self._frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        self._failed = False
        self._at_end: list[Callable[[], None]] = []
        self._device_watch = EndWatch("ellm-group-device")
        self._listener = None if spec.rank == 0 else meeting.Listener(spec)

    @staticmethod
    def join(spec: RankSpec, rendezvous: Rendezvous | None = None) -> Group:
        """Wait for the others. `rendezvous`: of rank 0, which opens one on `spec.port` itself without it."""
        store = meeting.meet(spec, rendezvous)
        return Group(spec, store, meeting.connect(spec, store))

    @property
    def rank(self) -> int:
        return self.spec.rank

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def store(self) -> Any:
        return self._store

    @property
    def gloo(self) -> Any:
        """For tensors on the CPU."""
        if self._gloo is None:
            raise GroupFailed("the group has ended")
        return self._gloo

    def start(self, begin: Callable[[], Work]) -> Work:
        """Start a collective; what breaks it is told as the group's failure."""
        try:
            return begin()
        except RuntimeError as error:
            raise self.failure(error) from None

    def wait(self, work: Work) -> None:
        """Wait for a collective; what breaks it is told as the group's failure. A rank that has failed keeps
        its connections for as long as its process lives, so its last words are looked for meanwhile."""
        while True:
            try:
                work.wait(_LOOK_EVERY)
                return
            except RuntimeError as error:
                if _STILL_RUNNING not in str(error):
                    raise self.failure(error) from None
            reason = self._reason()
            if reason is not None:
                raise reason

    def wait_for_device(self, step: BegunStep) -> None:
        """Until this rank's device has ended a step. Devices wait for each other without an end, so the
        others' last words are looked for meanwhile, and the step may take as long as a collective."""
        if step.ended:
            return
        ended = threading.Event()
        self._device_watch.tell(step.wait, ended.set)
        until = time.monotonic() + self.spec.timeouts.step_s
        while not ended.wait(_LOOK_EVERY.total_seconds()):
            reason = self._reason()
            if reason is not None:
                raise reason
            if time.monotonic() > until:
                raise GroupFailed(
                    f"rank {self.rank}: its device has not ended a step within {self.spec.timeouts.step_s} s"
                )

    def at_end(self, act: Callable[[], None]) -> None:
        """Also when this rank leaves."""
        self._at_end.append(act)

    def failure(self, error: Exception) -> EllmError | GroupFailed:
        """What a collective's error means: a peer's own reason if it gave one."""
        if isinstance(error, GroupFailed):
            return error
        until = time.monotonic() + _REASON_S
        while time.monotonic() < until:
            if (reason := self._reason()) is not None:
                return reason
            time.sleep(meeting.POLL_S)
        # "[file:line] what happened"
        text = str(error).strip().partition("\n")[0].rpartition("] ")[2] or repr(error)
        return GroupFailed(f"rank {self.rank} lost the group: {text}")

    def _reason(self) -> EllmError | GroupFailed | None:
        """What another rank has said that it failed with. The store is in rank 0's process."""
        if self._listener is not None:
            return self._listener.heard
        return meeting.read_failure(self._store, self.spec)

    def agree_least(self, values: Sequence[int]) -> list[int]:
        """The least of each value over all ranks."""
        least = torch.tensor(list(values), dtype=torch.int64)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self.wait(self.start(lambda: self.gloo.allreduce([least], options)))
        numbers: list[int] = least.tolist()
        return numbers

    def barrier(self) -> None:
        """Until every rank is here."""
        self.agree_least([0])

    def ready(self) -> None:
        """Every rank has loaded; from now on they wait for each other no longer than `step_s`."""
        self.barrier()
        self.gloo._set_default_timeout(timedelta(seconds=self.spec.timeouts.step_s))

    def send(self, message: bytes) -> None:
        """Rank 0: to all others."""
        assert self.rank == 0
        self._broadcast(message)

    def receive(self) -> bytes:
        """Others: what rank 0 sends next."""
        assert self.rank != 0
        return self._broadcast(None)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank gives up, and leave. It may be called twice."""
        if not self._failed:
            self._failed = True
            if self._reason() is None:  # the first failure is what the others must know
                with contextlib.suppress(RuntimeError):
                    meeting.write_failure(self._store, self.rank, error)
        self.close()

    def close(self) -> None:
        """Leave."""
        self._device_watch.stop()
        if self._listener is not None:
            self._listener.stop()
        gloo, self._gloo = self._gloo, None
        if gloo is not None:
            for act in self._at_end:
                act()
            # Its end waits for collectives under way, and those of a group that has failed take their time.
            dropped = [gloo]
            del gloo
            if self._failed:
                threading.Thread(target=dropped.clear, name="ellm-group-end", daemon=True).start()

    def _broadcast(self, message: bytes | None) -> bytes:
        """8 bytes of length, the beginning, and in a second message what is longer."""
        frame, room = self._frame, _FRAME_BYTES - 8
        if message is not None:
            head = len(message).to_bytes(8, "little") + message[:room]
            frame[: len(head)] = _bytes_tensor(head)
        self.wait(self.start(lambda: self.gloo.broadcast(frame, 0)))
        if message is None:
            length = int.from_bytes(frame[:8].numpy().tobytes(), "little")
            head = frame[8 : 8 + min(length, room)].numpy().tobytes()
        else:
            length, head = len(message), message[:room]
        if length <= room:
            return head
        rest = (
            torch.empty(length - room, dtype=torch.uint8)
            if message is None
            else _bytes_tensor(message[room:])
        )
        self.wait(self.start(lambda: self.gloo.broadcast(rest, 0)))
        return head + rest.numpy().tobytes() if message is None else message


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
