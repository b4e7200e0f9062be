"""Pictures of simulations: bars for the policies of a setting, curves for a grid. Needs matplotlib."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from ellm.worker.api.errors import ConfigError


def check_plot(path: str) -> None:
    """Raise ConfigError unless a picture can be written there: matplotlib, a known kind, a folder."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'ellm-on-ray[plot]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"--plot {path}: the name must end in one of {', '.join(sorted(kinds))}")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {Path(path).parent}")


def plot(result: dict[str, Any], path: str) -> None:
    """Write the picture of a result file's content."""
    from matplotlib.figure import Figure

    policies: dict[str, dict[str, Any]] = result["policies"]
    names = list(policies)
    figure = Figure(figsize=(13.0, 4.0 + 1.0 * len(names)), layout="constrained")
    axes = figure.subplots(2, 2)
    _bars(
        axes[0][0],
        "tokens per second",
        names,
        {
            "throughput": [policies[name]["throughput_tok_s"] for name in names],
            "goodput": [policies[name]["goodput_tok_s"] for name in names],
            "strict goodput": [policies[name]["goodput_strict_tok_s"] for name in names],
        },
    )
    axes[0][0].axvline(result["bound_tok_s"], color="black", linestyle="--", linewidth=1, label="bound")
    axes[0][0].legend(fontsize="small")
    _bars(
        axes[0][1],
        "share of requests that attain the SLO",
        names,
        {
            "mean TPOT": [policies[name]["slo_attainment"] for name in names],
            "every token": [policies[name]["slo_attainment_strict"] for name in names],
        },
    )
    axes[0][1].set_xlim(0.0, 1.05)
    _bars(
        axes[1][0],
        "time to the first token, s",
        names,
        {
            "mean": [policies[name]["ttft_mean_s"] for name in names],
            "p50": [policies[name]["ttft_p50_s"] for name in names],
            "p99": [policies[name]["ttft_p99_s"] for name in names],
        },
    )
    axes[1][0].set_xscale("log")
    _bars(
        axes[1][1],
        "time per output token, s",
        names,
        {
            "mean": [policies[name]["tpot_mean_s"] for name in names],
            "p99": [policies[name]["tpot_p99_s"] for name in names],
        },
    )
    axes[1][1].axvline(result["setting"]["tpot_slo_ms"] / 1000, color="black", linestyle="--", linewidth=1)
    setting = result["setting"]
    figure.suptitle(
        f"{setting['model']} on {setting['tp']} x {setting['gpu']}, {setting['workload']}, "
        f"load {result['load']:.3g}, SLO {setting['tpot_slo_ms']:g} ms"
    )
    figure.savefig(path, dpi=120)


def plot_curves(raw: list[dict[str, Any]], path: str) -> None:
    """Goodput over the SLO, a line per policy, a panel for each model, GPU, load and cv. `raw` is that of a
    sweep's result file: one item per setting, policy and seed."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for one in raw:
        s = one["setting"]
        title = f"{s['model']} on {s['gpu']}, load {s['load']:g}, cv {s['cv']:g}"
        curve = panels.setdefault(title, {}).setdefault(one["policy"], {})
        curve.setdefault(s["tpot_slo_ms"], []).append(one["goodput_tok_s"])
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.0 * columns, 4.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for policy, points in curves.items():
            slos = sorted(points)
            axis.plot(slos, [fmean(points[slo]) for slo in slos], marker="o", markersize=3, label=policy)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("SLO, ms per token")
        axis.set_ylabel("goodput, tok/s")
        axis.set_ylim(0.0, 1.1 * max(map(fmean, chain.from_iterable(c.values() for c in curves.values()))))
        axis.legend(fontsize="x-small")
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, title: str, names: list[str], series: dict[str, list[float]]) -> None:
    height = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        axis.barh([y + i * height for y in range(len(names))], values, height, label=label)
    axis.set_title(title, fontsize="medium")
    axis.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
    axis.invert_yaxis()
    axis.legend(fontsize="small")
