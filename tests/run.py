"""Runs the suite in jobs, on all cores, and holds each folder's time against its budget.

A job is a folder, or a part of `unit`; each is a pytest process of its own (tests/jobs.py says which may run
beside which). What a job prints is shown when it has ended. A folder over its budget is printed loudly; on CI
(variable CI) more than twice the budget fails the run. Machines are noisy: less than that never does.

On CI, where whole clusters run (`CLUSTERS`), one or two tests of a folder that fail are run once more in a
fresh process: a machine that stands still can break what such a test waits for. What passes only then is
named at the end, for somebody to look into.

    python tests/run.py [--full] [--lanes N] [FOLDER ...] [pytest options]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from jobs import CLUSTERS, Job, Lanes, make_jobs

TESTS = Path(__file__).parent
NO_TESTS = 5  # pytest's exit code
INTERRUPTED = 2
MOST_TRIED_AGAIN = 2
MOST_LANES = 2  # more if asked for: cores that are counted may still be shared, and a job may hold a gigabyte
BELOW = 10  # the niceness of what yields: it gets a tenth of a core that somebody else wants
PATIENCE_S = 900  # and so long a test of it may take
SLOWEST = ("--durations=8", "--durations-min=5")  # are named: what to mend or mark when a folder takes long


@dataclass(slots=True)
class Outcome:
    """How one job went."""

    job: Job
    code: int
    seconds: float
    not_run: list[list[str]] = field(default_factory=list)  # [test, what it needs]
    again: list[str] = field(default_factory=list)  # tests that failed only once


def main(argv: Sequence[str]) -> int:
    full = "--full" in argv
    told = tomllib.loads((TESTS / "budgets.toml").read_text())
    budgets: dict[str, float] = told["seconds"]
    words = [word for word in argv if word != "--full"]
    num_lanes = min(MOST_LANES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    if "--lanes" in words:
        at = words.index("--lanes")
        num_lanes = int(words[at + 1])
        del words[at : at + 2]
    chosen = [word for word in words if word in budgets] or list(budgets)
    options = [word for word in words if word not in budgets]
    if not full:
        options += ["-m", "not slow"]
    start = time.monotonic()
    outcomes = Suite(make_jobs(TESTS, chosen), options, num_lanes).run()
    wall_s = time.monotonic() - start
    if unsteady := [test for outcome in outcomes for test in outcome.again]:
        print("\nPassed at the second try only:", *unsteady, sep="\n  ")
    limit_s = told["wall"] if chosen == list(budgets) and not full else float("inf")
    late = f"  OVER BUDGET ({limit_s:.0f})" if wall_s > limit_s else ""
    return report(outcomes, {name: budgets[name] for name in chosen}, f"{wall_s:>9.1f}{late}", full)


class Suite:
    """Jobs in lanes; what each printed comes out in one piece."""

    def __init__(self, jobs: Sequence[Job], options: Sequence[str], num_lanes: int) -> None:
        self._options = list(options)
        self._lanes: Lanes[Outcome] = Lanes(jobs, min(num_lanes, len(jobs)))
        self._live = num_lanes == 1 or len(jobs) == 1

    def run(self) -> list[Outcome]:
        """In the order in which they ended. A job that is interrupted is the last that begins."""
        outcomes = []
        for outcome in self._lanes.run(self._run_job):
            outcomes.append(outcome)
            if outcome.code == INTERRUPTED:
                self._lanes.stop()
        return outcomes

    def _run_job(self, job: Job) -> Outcome:
        with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "output").open("w+b") as output:
            print(f"{'=== ' if self._live else '... '}tests/{job.name}", flush=True)
            start = time.monotonic()
            outcome = self._pytest(job, Path(scratch), None if self._live else output)
            outcome.seconds = time.monotonic() - start
            if not self._live:
                output.seek(0)
                text = output.read().decode(errors="replace").rstrip()
                print(f"\n=== tests/{job.name}: {outcome.seconds:.1f} s\n{text}\n", flush=True)
        return outcome

    def _pytest(self, job: Job, scratch: Path, output: IO[bytes] | None) -> Outcome:
        # The console script: `python -m pytest` would put the top folders themselves on sys.path.
        pytest = str(Path(sys.executable).with_name("pytest"))
        command = [pytest, "-q", *SLOWEST, *map(str, job.paths), *self._options]
        if job.yields:
            command.insert(1, f"--timeout={PATIENCE_S}")
        if sys.stdout.isatty():
            command += ["--color=yes"]
        twice = job.name in CLUSTERS and bool(os.environ.get("CI"))
        if twice:  # what failed now, and not what failed in some run before
            command += ["-o", f"cache_dir={scratch}/cache"]
        summary = scratch / "summary.json"
        outcome = Outcome(job, self._call(job, [*command, f"--not-run-file={summary}"], output), 0.0)
        outcome.not_run = json.loads(summary.read_text()) if summary.exists() else []
        again = failures(scratch) if outcome.code == 1 and twice else []
        if 0 < len(again) <= MOST_TRIED_AGAIN:
            message = "\n".join([f"\n=== tests/{job.name}: once more", *again, ""])
            if output is None:
                print(message, flush=True)
            else:
                output.write(message.encode())
                output.flush()
            outcome.code = self._call(job, [*command, "--last-failed"], output)
            outcome.again = again if outcome.code == 0 else []
        return outcome

    def _call(self, job: Job, command: list[str], output: IO[bytes] | None) -> int:
        process = subprocess.Popen(command, cwd=TESTS.parent, stdout=output, stderr=output)
        if job.yields and not self._live:
            os.setpriority(os.PRIO_PROCESS, process.pid, BELOW)  # and what it starts from now on
        return process.wait()


def failures(scratch: Path) -> list[str]:
    """The tests that pytest noted as failed."""
    noted = scratch / "cache/v/cache/lastfailed"
    return list(json.loads(noted.read_text())) if noted.exists() else []


def report(outcomes: Sequence[Outcome], budgets: dict[str, float], wall: str, full: bool) -> int:
    failed = []
    print(f"\n{'folder':<10}{'seconds':>9}{'budget':>9}")
    for folder, budget in budgets.items():
        mine = [outcome for outcome in outcomes if outcome.job.folder == folder]
        if not mine:
            continue
        seconds = sum(outcome.seconds for outcome in mine)
        over = seconds > budget and not full
        bad = any(outcome.code not in (0, NO_TESTS) for outcome in mine)
        bad = bad or (over and seconds > 2 * budget and bool(os.environ.get("CI")))
        remark = ("  FAILED" if bad else "") + ("  OVER BUDGET" if over else "")
        print(f"{folder:<10}{seconds:>9.1f}{budget:>9.0f}{remark}")
        failed += [folder] if bad else []
    print(f"{'wall':<10}{wall}")
    if not_run := [row for outcome in outcomes for row in outcome.not_run]:
        print("\nNot run on this machine:")
        for test, tool in not_run:
            print(f"  {test}: needs {tool}")
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nPassed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
