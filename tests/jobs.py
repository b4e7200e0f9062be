"""What of the suite runs beside what.

There are three kinds of jobs. Parts that wait by the clock, for threads and processes of their own, come
first, one in each lane. Then come whole clusters, one after another: they want the machine. Parts that only
compute and look at no clock fill what those leave, below their priority: a cluster takes no notice of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

CLUSTERS = ("ray", "e2e", "chaos")
# Only compute. Long ones first: what is begun last should be short.
COMPUTE = (
    "sim",
    "golden",
    "unit/engine",
    "unit/kernels",
    "unit/loadtest",
    "unit/model",
    "unit/cluster",
    "unit/...",
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """One pytest process."""

    name: str  # a folder, or a part of one
    paths: tuple[Path, ...]

    @property
    def folder(self) -> str:
        return self.name.partition("/")[0]

    @property
    def yields(self) -> bool:
        return self.name in COMPUTE


def make_jobs(tests: Path, folders: Sequence[str]) -> list[Job]:
    """Each folder with tests in it, `unit` in its parts, those with the most files first; in the order in
    which they should begin."""
    jobs = []
    for folder in folders:
        top = tests / folder
        if folder != "unit":
            jobs += [Job(folder, (top,))] if _num_files(top) else []
            continue
        parts = sorted((path for path in top.iterdir() if path.is_dir()), key=_num_files, reverse=True)
        jobs += [Job(f"{folder}/{part.name}", (part,)) for part in parts if _num_files(part)]
        if loose := tuple(sorted(top.glob("test_*.py"))):
            jobs.append(Job(f"{folder}/...", loose))
    return jobs


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("test_*.py"))


class Lanes(Generic[T]):
    """So many jobs at a time."""

    def __init__(self, jobs: Sequence[Job], num_lanes: int) -> None:
        rank = {name: place for place, name in enumerate(COMPUTE)}
        self._waiting = sorted(
            jobs, key=lambda job: rank.get(job.name, -1)
        )  # stable: the others as they come
        self._running: list[Job] = []
        self._num_lanes = num_lanes
        self._lock = threading.Lock()
        self._ended: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()

    def run(self, work: Callable[[Job], T]) -> Iterator[T]:
        """What `work` makes of each job, as they end. Ctrl-C reaches the jobs too: nothing new begins, and
        those that run are waited for."""
        lanes = [threading.Thread(target=self._lane, args=(work,)) for _ in range(self._num_lanes)]
        for lane in lanes:
            lane.start()
        open_lanes = len(lanes)
        while open_lanes:
            try:
                ended = self._ended.get()
            except KeyboardInterrupt:
                self.stop()
                continue
            if ended is None:
                open_lanes -= 1
            elif isinstance(ended, BaseException):
                self.stop()
                raise ended
            else:
                yield ended

    def stop(self) -> None:
        """Nothing new begins."""
        with self._lock:
            self._waiting.clear()

    def _lane(self, work: Callable[[Job], T]) -> None:
        try:
            while (job := self.take()) is not None:
                self._ended.put(work(job))
                self.give_back(job)
        except BaseException as error:
            self._ended.put(error)
        self._ended.put(None)

    def take(self) -> Job | None:
        """What may begin now. Where that is nothing, a lane has no more to do: who runs what the others wait
        for goes on with those."""
        with self._lock:
            job = next((job for job in self._waiting if self._may_begin(job)), None)
            if job is not None:
                self._waiting.remove(job)
                self._running.append(job)
        return job

    def give_back(self, job: Job) -> None:
        """It has ended."""
        with self._lock:
            self._running.remove(job)

    def _may_begin(self, job: Job) -> bool:
        return job.name not in CLUSTERS or all(other.yields for other in self._running)
