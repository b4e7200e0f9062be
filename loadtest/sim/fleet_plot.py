"""A picture of a simulated fleet's day: load, workers, goodput, first tokens over time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plot_day(runs: Mapping[str, Mapping[str, Any]], path: str) -> None:
    """`runs`: name of a variant -> its figures (fleet_metrics.py). The offered load is the first one's: all
    got the same. Crosses are deaths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 13.0), layout="constrained")
    load, workers, goodput, first = figure.subplots(4, 1, sharex=True)
    offered = next(iter(runs.values()))["series"]
    load.fill_between(
        [one["minute"] for one in offered], [one["offered_req_s"] for one in offered], color="0.8"
    )
    load.set_ylabel("requests per second")
    load.set_title("offered: a day from midnight to midnight, by the minute in which requests came")
    goodput.plot(
        [one["minute"] for one in offered],
        [one["offered_tok_s"] for one in offered],
        color="0.7",
        label="offered",
    )
    for name, run in runs.items():
        series = run["series"]
        minutes = [one["minute"] for one in series]
        (line,) = workers.step(minutes, [one["ready"] for one in series], where="post", label=name)
        deaths = [at / 60.0 for at, _ in run["deaths"]]
        workers.plot(deaths, [0.3] * len(deaths), "x", color=line.get_color(), markersize=5)
        goodput.plot(minutes, [one["goodput_tok_s"] for one in series], label=name)
        first.plot(minutes, [max(1e-3, one["ttft_mean_s"]) for one in series], label=name)
        first.plot(
            minutes,
            [max(1e-3, one["ttft_p99_s"]) for one in series],
            color=line.get_color(),
            linestyle=":",
            linewidth=1,
        )
    workers.set_ylabel("workers that serve (x: one dies)")
    goodput.set_ylabel("goodput, tokens per second")
    first.set_ylabel("first token, s: mean, and p99 dotted")
    first.set_yscale("log")
    first.set_xlabel("minutes")
    for axis in (workers, goodput, first):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
