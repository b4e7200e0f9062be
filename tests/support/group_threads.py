"""Ranks as threads of one process: enough for what concerns the group and not the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ellm.worker.parallel.group import Group, RankSpec, Rendezvous, Timeouts

QUICK = Timeouts(start_s=30.0, step_s=1.0, heartbeat_s=0.1)


def specs(size: int, timeouts: Timeouts = QUICK) -> tuple[Rendezvous, list[RankSpec]]:
    """A rendezvous of `size` ranks."""
    rendezvous = Rendezvous.listen()
    return rendezvous, [RankSpec(rank, size, port=rendezvous.port, timeouts=timeouts) for rank in range(size)]


@contextlib.contextmanager
def ranks(
    size: int, act: Callable[[Group], Any], timeouts: Timeouts = QUICK
) -> Iterator[tuple[Group, list[Future[Any]]]]:
    """Rank 0's membership, and what the others' `act` comes to."""
    rendezvous, ours = specs(size, timeouts)
    with ThreadPoolExecutor(size) as pool:
        others = [pool.submit(_act_and_leave, act, spec) for spec in ours[1:]]
        group = Group.join(ours[0], rendezvous)
        try:
            yield group, others
        except BaseException as error:
            group.fail(error)
            raise
        finally:
            group.close()


def _act_and_leave(act: Callable[[Group], Any], spec: RankSpec) -> Any:
    group = Group.join(spec)
    try:
        return act(group)
    except Exception as error:
        group.fail(error)
        raise
    finally:
        group.close()
