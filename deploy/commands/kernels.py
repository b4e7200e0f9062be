"""`ellm kernels`: whether the Triton kernels compute what they should, and what they take of a GPU."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ellm.kernels.triton_aot import Compiled
    from ellm.kernels.triton_check import Verdict

EPILOG = """\
check runs every kernel in every configuration against its torch twin: on the GPU where there is one, else on
tiny shapes under Triton's interpreter. With --aot it compiles them for a GPU that need not be there, and says
what each takes of it. Exit code 1: a result is wrong, or a kernel does not compile or fit.

examples:
  ellm kernels check
  ellm kernels check --aot sm_90 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("action", choices=("check",))
    add("--aot", metavar="ARCH", help="compile for this architecture instead, sm_90 for Hopper")
    add("--kernel", metavar="NAME", help="one kernel alone, paged_attention for example")
    add("--quick", action="store_true", help="each tile, type and head dimension once")
    add("--verbose", action="store_true", help="a line per case")
    add("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ellm.worker.api.errors import ConfigError

    if find_spec("triton") is None:
        raise ConfigError("triton is not installed (pip install 'ellm-on-ray[gpu]')")
    mode, cases = _compiled(args) if args.aot else _checked(args)
    found = []
    for case in cases:
        found.append(case)
        if not args.json and (args.verbose or not case.passed):
            print(_case_line(case), flush=True)
    if not found:
        raise ConfigError(f"there is no kernel {args.kernel!r}")
    summary = _summary(found, aot=bool(args.aot))
    failed = sum(not case.passed for case in found)
    if args.json:
        print(json.dumps(_as_json(mode, summary, found)))
    else:
        for name, figures in summary.items():
            print(f"{name:<16} {_figures(figures)}")
        print(f"{mode}: {len(found)} cases, {failed} failed")
    return 1 if failed else 0


def _checked(args: argparse.Namespace) -> tuple[str, Iterable[Verdict]]:
    """What runs where, and the verdicts to come. Kernels are interpreted where there is no GPU."""
    import numpy
    import torch

    from ellm.worker.api.errors import ConfigError

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    old = version("triton").startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    if interpreted and old:
        raise ConfigError(
            "the interpreter of triton 3.6 does not work with numpy 2.4: newer Triton, or older numpy"
        )
    from ellm.kernels import dispatch

    problem = dispatch.triton_problem("cpu" if interpreted else "cuda")
    if problem:
        raise ConfigError(problem)
    from ellm.kernels.triton_check import check

    device = torch.device("cpu" if interpreted else "cuda")
    place = "interpreter" if interpreted else torch.cuda.get_device_name(device)
    mode = f"triton {version('triton')}, {place}"
    return mode, check(device, quick=args.quick, kernel=args.kernel)


def _compiled(args: argparse.Namespace) -> tuple[str, Iterable[Compiled]]:
    from ellm.worker.api.errors import ConfigError

    os.environ.pop("TRITON_INTERPRET", None)
    from ellm.kernels.triton_aot import capability, compile_all

    try:
        arch = capability(args.aot)
    except ValueError as error:
        raise ConfigError(f"--aot: {error}") from None
    mode = f"triton {version('triton')}, compiled for sm_{arch}"
    return mode, compile_all(arch, quick=args.quick, kernel=args.kernel)


def _case_line(case: Verdict | Compiled) -> str:
    """One case in full; a failure says why."""
    word = "ok  " if case.passed else "FAIL"
    return f"{word} {case.kernel:<16} {case.detail}: {case.failure or case.result}"


def _summary(found: list[Any], *, aot: bool) -> dict[str, dict[str, float]]:
    """kernel -> the worst of its cases."""
    summary: dict[str, dict[str, float]] = {}
    keys = ("registers", "shared_bytes", "spill_bytes") if aot else ("error",)
    for case in found:
        figures = summary.setdefault(case.kernel, {"cases": 0, "failed": 0, "seconds": 0.0})
        figures["cases"] += 1
        figures["failed"] += not case.passed
        figures["seconds"] += case.seconds
        for key in keys:
            figures[key] = max(figures.get(key, 0), getattr(case, key))
    return summary


def _figures(figures: dict[str, float]) -> str:
    cases, failed = int(figures["cases"]), int(figures["failed"])
    parts = [f"{cases - failed} of {cases} ok"]
    if "error" in figures:
        parts.append(f"largest error {figures['error']:.1e}")
    if "registers" in figures:
        parts.append(f"at most {figures['registers']:.0f} registers")
        parts.append(
            f"{figures['shared_bytes'] / 1024:.1f} KiB shared, {figures['spill_bytes']:.0f} B spilled"
        )
    return ", ".join([*parts, f"{figures['seconds']:.1f} s"])


def _as_json(mode: str, summary: dict[str, dict[str, float]], found: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    cases = [asdict(case) | {"passed": case.passed} for case in found]
    for case in cases:  # JSON has no infinity
        if case.get("error") == float("inf"):
            case["error"] = None
    for figures in summary.values():
        if figures.get("error") == float("inf"):
            del figures["error"]
    failed = sum(not case.passed for case in found)
    return {"mode": mode, "total": len(found), "failed": failed, "kernels": summary, "cases": cases}
