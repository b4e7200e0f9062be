"""The executor of a tensor-parallel group, in rank 0's process: sends each plan to the other ranks and
computes its own part.

Between steps it shows signs of life, which the others answer: so each notices when another is gone. Any error
ends the group, and every later call raises it again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.cost_model import CostModel
from ellm.worker.engine.plan import BatchPlan, ModelLimits, StepResult
from ellm.worker.executor.base import BegunStep, EndedStep
from ellm.worker.executor.local import LocalExecutor, LocalStep
from ellm.worker.model.grammar import Grammars
from ellm.worker.model.hub import local_folder
from ellm.worker.model.inspect import read_architecture
from ellm.worker.model.loader import Progress, no_progress
from ellm.worker.model.shard import check_sharding
from ellm.worker.parallel.group import Group, GroupFailed
from ellm.worker.parallel.messages import ALIVE, BEGIN, CLOSE, PLAN, READ, Message, checksum
from ellm.worker.parallel.peers import GroupPeers
from ellm.worker.parallel.plan_codec import PlanPacker

log = logging.getLogger(__name__)


class GroupStep:
    """A step that every rank's device has been asked for: see BegunStep."""

    def __init__(self, owner: TensorParallelExecutor, local: LocalStep) -> None:
        self._owner, self._local = owner, local

    @property
    def ended(self) -> bool:
        return self._local.ended

    @property
    def feeds_back(self) -> bool:
        return self._local.feeds_back

    def wait(self) -> None:
        self._local.wait()

    def result(self) -> StepResult:
        """Raises GroupFailed as `execute`."""
        return self._owner.read(self._local)


class TensorParallelExecutor:
    """`execute`, `begin`, their results and `close` may be called by any one thread at a time."""

    def __init__(
        self,
        local: LocalExecutor,
        group: Group,
        peers: GroupPeers,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """See `load`."""
        self._local = local
        self._peers = peers
        self._group = group
        self._on_failure = on_failure
        self._packer = PlanPacker(local.limits.block_size)
        self._number = self._checksum = 0  # of the next message; of the last step's tokens
        self._lock = threading.Lock()  # whoever speaks to the group
        self._stopped = threading.Event()
        self.failure: Exception | None = None  # what ended the group
        # Whether a step may be asked for before the one before has been read: what a CPU is asked for it has
        # computed, and to read it apart would cost another message.
        self.queues = local.device.startswith("cuda")
        self.device, self.dtype, self.deterministic = local.device, local.dtype, local.deterministic
        self.at_close: Callable[[], None] = lambda: None
        self._alive = threading.Thread(target=self._show_life, name="ellm-group", daemon=True)
        self._alive.start()

    @staticmethod
    def load(
        config: WorkerConfig,
        group: Group,
        progress: Progress = no_progress,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> TensorParallelExecutor:
        """Load rank 0's part while the others load theirs. `on_failure`: called once, from any thread, when
        the group has ended by an error, also between steps.

        Raises ConfigError naming what cannot work, on whichever rank; GroupFailed where one died.
        """
        assert group.rank == 0
        assert group.size == config.tensor_parallel_size
        try:
            peers = GroupPeers(group)
            local = LocalExecutor.load(config, progress, peers)
            group.ready()
        except BaseException as error:
            group.fail(error)
            raise
        return TensorParallelExecutor(local, group, peers, on_failure)

    @property
    def limits(self) -> ModelLimits:
        return self._local.limits

    @property
    def local(self) -> LocalExecutor:
        """This rank's part."""
        return self._local

    @property
    def grammars(self) -> Grammars | None:
        """Rank 0's; the other ranks compile when the first plan names a sequence."""
        return self._local.grammars

    @property
    def communication_s(self) -> float:
        """Seconds that rank 0 has spent on sums so far, waiting for slower ranks included; on a CPU."""
        return self._peers.communication_s

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step on all ranks. Raises GroupFailed within `Timeouts.step_s` when a rank dies or stands
        still; any exception ends the group."""
        start = time.perf_counter()
        with self._lock, self._ending_group():
            self._say(PLAN, self._packer.pack(plan))
            result = self._result_of(self._local.begin(plan))
        return replace(result, elapsed_s=time.perf_counter() - start)

    def begin(self, plan: BatchPlan) -> BegunStep:
        """Ask all ranks for a step; see BeginningExecutor. Raises as `execute`."""
        if not self.queues:
            return EndedStep(self.execute(plan))
        with self._lock, self._ending_group():
            self._say(BEGIN, self._packer.pack(plan))
            return GroupStep(self, self._local.begin(plan))

    def read(self, step: LocalStep) -> StepResult:
        """Every rank reads the step that it began first and has not read."""
        with self._lock, self._ending_group():
            self._say(READ)
            return self._result_of(step)

    def _result_of(self, step: LocalStep) -> StepResult:
        self._group.wait_for_device(step)
        result = step.result()
        self._checksum = checksum(result.token_ids)
        return result

    def profile(self, config: WorkerConfig, progress: Progress) -> CostModel:
        """See LocalExecutor; steps are those of the group."""
        return self._local.profile(config, progress, self)

    def close(self) -> None:
        """Let the other ranks end, and free this one's weights and pool."""
        self._stopped.set()
        with self._lock, contextlib.suppress(Exception), self._ending_group():
            self._say(CLOSE)
            self._group.barrier()
        self._alive.join()
        self._group.close()
        self._local.close()
        self.at_close()

    def _say(self, kind: int, payload: bytes = b"") -> None:
        if self.failure is not None:
            raise self.failure
        self._group.send(Message(kind, self._number, self._checksum, payload).pack())
        self._number += 1

    @contextlib.contextmanager
    def _ending_group(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # an interrupt, too, leaves the others in the middle of a step
            if self.failure is None:
                self.failure = error if isinstance(error, Exception) else GroupFailed(repr(error))
                self._group.fail(self.failure)
                if self._on_failure is not None:
                    self._on_failure(self.failure)
            raise

    def _show_life(self) -> None:
        """While nobody else speaks to the group: each side shows the other that it is there."""
        while not self._stopped.wait(self._group.spec.timeouts.heartbeat_s):
            if not self._lock.acquire(blocking=False):
                continue  # somebody speaks
            try:
                if self._stopped.is_set():
                    return
                with self._ending_group():
                    self._say(ALIVE)
                    self._group.barrier()
            except Exception as error:  # the edge: this thread's own
                log.error("the group has ended: %s", error)
                return
            finally:
                self._lock.release()


def check_group(config: WorkerConfig) -> None:
    """Before any rank is started. Raises ConfigError for a model that so many ranks cannot share."""
    arch = read_architecture(local_folder(config.model.path, config.model.revision))
    check_sharding(arch, config.tensor_parallel_size)


__all__ = ["GroupFailed", "TensorParallelExecutor", "check_group"]
