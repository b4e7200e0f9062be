"""What `ellm bench` does once its flags are read: one run, several rates, a search, a comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ellm.loadtest.generator import report_html, report_json, text
from ellm.loadtest.generator.check import checked_target
from ellm.loadtest.generator.live import LiveLine
from ellm.loadtest.generator.options import Options
from ellm.loadtest.generator.plan import make_plan
from ellm.loadtest.generator.run import run_once
from ellm.loadtest.generator.sweep import parse_shares, parse_sweep, search
from ellm.loadtest.generator.target import Target
from ellm.loadtest.generator.worker_states import WorkerStates
from ellm.worker.api.errors import ConfigError

PAUSE_S = 1.0  # between rates: nothing of the one before is left, its last reports are in
NOTHING_ANSWERED = 1  # exit code


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go beside the terminal."""

    json: str | None = None
    html: str | None = None
    quiet: bool = False


def single(options: Options, outputs: Outputs) -> int:
    """One run. The exit code is 1 when no request was answered."""
    make_plan(options)  # what is wrong with the workload is said before the server is asked
    target = checked_target(options)
    print(_announcement(options, target))
    result = measured(options, target, outputs.quiet)
    print("\n".join(["", *text.summary_lines(result)]))
    _write(outputs, result, lambda: report_html.run_page(result))
    summary = result["summary"]
    return NOTHING_ANSWERED if summary["failed"] and not summary["completed"] else 0


def sweep_rates(options: Options, spec: str, duration_s: float | None, outputs: Outputs) -> int:
    """The same workload at each rate of `spec`."""
    rates = parse_sweep(spec)
    at_rate = _at_rate(options, duration_s)
    make_plan(at_rate(rates[0]))
    target = checked_target(at_rate(rates[0]))
    results = []
    for rate in rates:
        results.append(_announced(at_rate(rate), target, outputs.quiet))
        if results[-1]["interrupted"]:
            break
    print("\n".join(["", *text.sweep_lines(results)]))
    whole = {"format": report_json.FORMAT, "sweep": results}
    _write(outputs, whole, lambda: report_html.sweep_page(results))
    return 0


def search_rates(options: Options, spec: str, duration_s: float | None, outputs: Outputs) -> int:
    """The highest rates that keep the SLOs for these shares of all requests."""
    shares = parse_shares(spec)
    if not options.slo:
        raise ConfigError("--search needs an SLO: --ttft-slo-ms, --tpot-slo-ms or --e2e-slo-ms")
    at_rate = _at_rate(options, duration_s)
    start = options.rate or 1.0
    make_plan(at_rate(start))
    target = checked_target(at_rate(start))

    def measure(rate: float) -> dict[str, Any]:
        result = _announced(at_rate(rate), target, outputs.quiet)
        if result["interrupted"]:
            raise KeyboardInterrupt
        return result

    found = search(start, shares, measure)
    lines = ["", *text.sweep_lines(found.runs), ""]
    for share in shares:
        rate, above = found.rates[share], found.not_above[share]
        kept = "no rate that was tried" if rate is None else f"{rate:.4g} requests/s"
        failed = "" if above is None else f" (not at {above:.4g})"
        lines.append(f"{100 * share:g} % attain their SLO up to {kept}{failed}")
    print("\n".join(lines))
    rates = {f"{100 * share:g}": found.rates[share] for share in shares}
    whole = {"format": report_json.FORMAT, "highest_rate_req_s": rates, "sweep": found.runs}
    _write(outputs, whole, lambda: report_html.sweep_page(found.runs, rates))
    return 0


def compare(paths: Sequence[str], html: str | None) -> int:
    """Two results side by side."""
    a, b = (report_json.read_json(path) for path in paths)
    names = (Path(paths[0]).name, Path(paths[1]).name)
    print("\n".join(text.compare_lines(a, b, names)))
    if html is not None:
        _write_text(html, report_html.compare_page(a, b, names))
    return 0


def measured(options: Options, target: Target, quiet: bool = True) -> dict[str, Any]:
    """One run's result, with a live line unless `quiet`."""
    line = LiveLine(_num_turns(options))
    states = WorkerStates(target) if target.ours else None
    try:
        run = run_once(options, target, None if quiet else line.show, states)
    finally:
        if states is not None:
            states.close()
        if not quiet:
            line.clear()
    return report_json.result_of(run)


def _announced(options: Options, target: Target, quiet: bool) -> dict[str, Any]:
    print(_announcement(options, target), flush=True)
    result = measured(options, target, quiet)
    attained = result["summary"]["slo_attainment"]
    if attained is not None:
        print(f"  {100 * attained:.1f} % attain", flush=True)
    time.sleep(PAUSE_S)
    return result


def _at_rate(options: Options, duration_s: float | None) -> Callable[[float], Options]:
    """The options at another rate: as many requests, or as many as come in `duration_s`."""

    def at_rate(rate: float) -> Options:
        count = options.num_requests if duration_s is None else max(1, round(duration_s * rate))
        return replace(options, rate=rate, num_requests=count)

    return at_rate


def _num_turns(options: Options) -> int:
    return sum(len(session.turns) for session in make_plan(options))


def _announcement(options: Options, target: Target) -> str:
    rate = "the trace's own rate" if options.rate is None else f"{options.rate:.4g} requests/s"
    what = "sessions" if options.turns != "1" else "requests"
    return (
        f"{target.model} at {target.url} ({target.endpoint}): {options.num_requests:,} {what}, "
        f"{options.arrivals}, {rate}"
    )


def _write(outputs: Outputs, result: dict[str, Any], page: Callable[[], str]) -> None:
    if outputs.json is not None:
        report_json.write_json(outputs.json, result)
        print(f"wrote {outputs.json}")
    if outputs.html is not None:
        _write_text(outputs.html, page())


def _write_text(path: str, page: str) -> None:
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}")
