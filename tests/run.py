"""Runs the suite folder by folder and holds each folder's time against its budget.

A folder over its budget is printed loudly; on CI (variable CI) more than twice the budget fails the run.
Machines are noisy: less than that never does.

On CI, where whole clusters run (`SECOND_TRY`), one or two tests of a folder that fail are run once more in a
fresh process: a machine that stands still can break what such a test waits for. What passes only then is
named at the end, for somebody to look into.

    python tests/run.py [--full] [FOLDER ...] [pytest options]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

TESTS = Path(__file__).parent
NO_TESTS = 5  # pytest's exit code
SECOND_TRY = {"ray", "e2e", "chaos"}
MOST_TRIED_AGAIN = 2


def main(argv: list[str]) -> int:
    full = "--full" in argv
    budgets: dict[str, float] = tomllib.loads((TESTS / "budgets.toml").read_text())["seconds"]
    words = [word for word in argv if word != "--full"]
    chosen = [word for word in words if word in budgets] or list(budgets)
    options = [word for word in words if word not in budgets]
    if not full:
        options += ["-m", "not slow"]
    rows, not_run, unsteady = [], [], []
    for folder in chosen:
        if not any((TESTS / folder).rglob("test_*.py")):
            continue
        code, seconds, skipped, again = run_folder(folder, options)
        rows.append((folder, code, seconds, budgets[folder]))
        not_run += skipped
        unsteady += again
        if code == 2:  # interrupted
            break
    if unsteady:
        print("\nPassed at the second try only:", *unsteady, sep="\n  ")
    return report(rows, not_run, full)


def run_folder(folder: str, options: list[str]) -> tuple[int, float, list[list[str]], list[str]]:
    """(pytest's exit code, seconds, [test, what it needs] of those not run, tests that failed only once)."""
    print(f"\n=== tests/{folder}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        summary = Path(scratch) / "summary.json"
        # The console script: `python -m pytest` would put the top folders themselves on sys.path.
        pytest = str(Path(sys.executable).with_name("pytest"))
        command = [pytest, "-q", str(TESTS / folder), *options]
        twice = folder in SECOND_TRY and bool(os.environ.get("CI"))
        if twice:  # what failed now, and not what failed in some run before
            command += ["-o", f"cache_dir={scratch}/cache"]
        code = subprocess.run([*command, f"--not-run-file={summary}"], cwd=TESTS.parent).returncode
        not_run = json.loads(summary.read_text()) if summary.exists() else []
        again = failures(Path(scratch)) if code == 1 and twice else []
        if 0 < len(again) <= MOST_TRIED_AGAIN:
            print(f"\n=== tests/{folder}: once more", *again, flush=True)
            code = subprocess.run([*command, "--last-failed"], cwd=TESTS.parent).returncode
    return code, time.monotonic() - start, not_run, again if code == 0 else []


def failures(scratch: Path) -> list[str]:
    """The tests that pytest noted as failed."""
    noted = scratch / "cache/v/cache/lastfailed"
    return list(json.loads(noted.read_text())) if noted.exists() else []


def report(rows: list[tuple[str, int, float, float]], not_run: list[list[str]], full: bool) -> int:
    failed = []
    print(f"\n{'folder':<10}{'seconds':>9}{'budget':>9}")
    for folder, code, seconds, budget in rows:
        over = seconds > budget and not full
        bad = code not in (0, NO_TESTS) or (over and seconds > 2 * budget and bool(os.environ.get("CI")))
        remark = ("  FAILED" if bad else "") + ("  OVER BUDGET" if over else "")
        print(f"{folder:<10}{seconds:>9.1f}{budget:>9.0f}{remark}")
        failed += [folder] if bad else []
    print(f"{'total':<10}{sum(row[2] for row in rows):>9.1f}{sum(row[3] for row in rows):>9.0f}")
    if not_run:
        print("\nNot run on this machine:")
        for test, tool in not_run:
            print(f"  {test}: needs {tool}")
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nPassed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
