"""The suite's jobs: every test file is in one, and nothing that waits by the clock runs beside a cluster."""

from __future__ import annotations

import threading
import time
import tomllib

import pytest
from jobs import CLUSTERS, COMPUTE, Job, Lanes, make_jobs
from support.tree import ROOT

TESTS = ROOT / "tests"
FOLDERS = list(tomllib.loads((TESTS / "budgets.toml").read_text())["seconds"])


def jobs() -> list[Job]:
    return make_jobs(TESTS, FOLDERS)


def test_each_test_file_is_in_one_job() -> None:
    found = [
        file
        for job in jobs()
        for path in job.paths
        for file in (path.rglob("test_*.py") if path.is_dir() else [path])
    ]
    assert sorted(found) == sorted(TESTS.rglob("test_*.py"))


def test_every_name_is_a_job() -> None:
    names = [job.name for job in jobs()]
    assert len(set(names)) == len(names)
    assert {*CLUSTERS, *COMPUTE} <= set(names)


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_each_job_runs_once_and_clusters_have_no_clock_beside_them(num_lanes: int) -> None:
    running: list[Job] = []
    beside: list[tuple[Job, ...]] = []
    lock = threading.Lock()

    def work(job: Job) -> str:
        with lock:
            running.append(job)
            beside.append(tuple(running))
        time.sleep(0.002)
        with lock:
            running.remove(job)
        return job.name

    ended = list(Lanes(jobs(), num_lanes).run(work))
    assert sorted(ended) == sorted(job.name for job in jobs())
    for group in beside:
        assert len(group) <= num_lanes
        if any(job.name in CLUSTERS for job in group):
            assert sum(not job.yields for job in group) == 1
