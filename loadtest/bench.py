"""Run every benchmark one after the other, each in a process of its own, and regenerate docs/benchmarks.md.

    python -m ellm.loadtest.bench [NAME ...] [--quick]

A benchmark that fails is said so at the end; the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

# name -> (module, arguments of a short run)
BENCHMARKS = {
    "engine": ("ellm.loadtest.engine_bench", ["--rounds", "2"]),
    "core": ("ellm.loadtest.core_cost", []),
    "data-path": ("ellm.loadtest.data_path_cost", []),
    "start": ("ellm.loadtest.serve_start", ["--runs", "1"]),
    "http": ("ellm.loadtest.http_cost", ["--rounds", "1", "--tokens", "256"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it works")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for name in arguments.names or BENCHMARKS:
        module, short = BENCHMARKS[name]
        print(f"== {name}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", module, *(short if arguments.quick else [])], check=False
        )
        print(f"== {name}: {time.monotonic() - start:.0f} s, exit code {done.returncode}", flush=True)
        if done.returncode:
            failed.append(name)
    subprocess.run([sys.executable, "-m", "ellm.loadtest.benchmarks_page"], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
