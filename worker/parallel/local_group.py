"""A group whose ranks are child processes of this one: for a command line, a test, a benchmark.

In a cluster a supervisor starts the ranks instead (parallel/group.py says how).
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from ellm.worker.api.config import WorkerConfig
from ellm.worker.api.errors import EllmError
from ellm.worker.executor.tensor_parallel import TensorParallelExecutor, check_group
from ellm.worker.model.loader import Progress, no_progress
from ellm.worker.parallel.follower import run_follower
from ellm.worker.parallel.group import Group, GroupFailed, RankSpec, Rendezvous, Timeouts, report_death

_END_S = 5.0  # followers have so long to end by themselves
Follow = Callable[[WorkerConfig, RankSpec], None]


class LocalGroup:
    """`executor` is rank 0's; `processes` are the others, in order."""

    def __init__(
        self,
        config: WorkerConfig,
        progress: Progress = no_progress,
        timeouts: Timeouts | None = None,
        follow: Follow | None = None,
    ) -> None:
        """Start all ranks and load. `timeouts`: by default those of the config. `follow`: what a child runs.

        Raises ConfigError naming what cannot work, GroupFailed where a rank died; no process is left then.
        """
        check_group(config)
        size = config.tensor_parallel_size
        rendezvous = Rendezvous.listen()
        timeouts = timeouts or Timeouts(step_s=config.stall_s)
        specs = [RankSpec(rank, size, port=rendezvous.port, timeouts=timeouts) for rank in range(size)]
        context = multiprocessing.get_context("spawn")
        self.processes: list[BaseProcess] = [
            context.Process(target=follow or follow_quietly, args=(config, spec), daemon=True)
            for spec in specs[1:]
        ]
        loaded = threading.Event()
        watch = threading.Thread(target=self._watch, args=(specs[0], loaded), daemon=True)
        try:
            for process in self.processes:
                process.start()
            watch.start()
            group = Group.join(specs[0], rendezvous)
            self.executor = TensorParallelExecutor.load(config, group, progress)
        except BaseException:
            self.end(0.0)
            raise
        finally:
            loaded.set()
        self.executor.at_close = self.end

    def end(self, patience_s: float = _END_S) -> None:
        """No child is left when this returns."""
        for process in self.processes:
            if process.pid is None:
                continue
            process.join(patience_s)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _watch(self, spec: RankSpec, loaded: threading.Event) -> None:
        """Tell the group of a child that ends while it loads."""
        while not loaded.wait(0.05):
            for rank, process in enumerate(self.processes, 1):
                if process.exitcode is not None:
                    report_death(spec, rank, f"its process ended with code {process.exitcode}")
                    return
            wait([process.sentinel for process in self.processes], 0.5)


def follow_quietly(config: WorkerConfig, spec: RankSpec) -> None:
    """A child's main: rank 0 tells the user what went wrong, and ends the group when interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_follower(config, spec)
    except (EllmError, GroupFailed):
        raise SystemExit(1) from None
