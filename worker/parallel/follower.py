"""A rank above 0: loads its part, then executes what rank 0 sends. It decides nothing and answers nothing;
what rank 0 must know it learns from the sums that they make together."""

from __future__ import annotations

from collections import deque

from ellm.worker.api.config import WorkerConfig
from ellm.worker.executor.local import LocalExecutor, LocalStep
from ellm.worker.model.loader import Progress, no_progress
from ellm.worker.parallel.group import Group, GroupFailed, RankSpec
from ellm.worker.parallel.messages import ALIVE, BEGIN, CLOSE, PLAN, READ, Message, checksum
from ellm.worker.parallel.peers import GroupPeers
from ellm.worker.parallel.plan_codec import PlanUnpacker


def run_follower(config: WorkerConfig, spec: RankSpec, progress: Progress = no_progress) -> None:
    """Blocks until rank 0 closes its executor. Raises what went wrong, here (the others are told) or
    elsewhere: GroupFailed, also within `step_s` after rank 0 has died or fallen silent, or ConfigError."""
    assert 0 < spec.rank < spec.size == config.tensor_parallel_size
    group = Group.join(spec)
    executor: LocalExecutor | None = None
    try:
        executor = LocalExecutor.load(config, progress, GroupPeers(group))
        group.ready()
        _obey(group, executor)
    except BaseException as error:
        group.fail(error)
        raise
    finally:
        if executor is not None:
            executor.close()
        group.close()


def _obey(group: Group, executor: LocalExecutor) -> None:
    unpacker, expected, sampled = PlanUnpacker(), 0, 0
    begun: deque[LocalStep] = deque()
    while True:
        message = Message.unpack(group.receive())
        if message.number != expected:
            raise GroupFailed(f"rank {group.rank} got message {message.number} and waited for {expected}")
        if message.checksum != sampled:
            raise GroupFailed(f"rank {group.rank} has sampled other tokens than rank 0")
        expected += 1
        if message.kind in (PLAN, BEGIN):
            begun.append(executor.begin(unpacker.unpack(message.payload)))
        if message.kind in (PLAN, READ):
            step = begun.popleft()
            group.wait_for_device(step)
            sampled = checksum(step.result().token_ids)
        elif message.kind != BEGIN:
            group.barrier()
            if message.kind == CLOSE:
                return
            assert message.kind == ALIVE
