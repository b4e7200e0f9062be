"""Whether what was sampled over a long run stayed flat. Pure: no clock, no process.

The first third of a run is its warm-up: caches fill, allocators find their size. Flat is a series whose mean
over the last third is at most `tolerance` above its mean over the second, or `slack` in the series' own unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

MIB_SLACK = 8.0  # what an allocator holds back and gives again
HANDLE_SLACK = 4.0  # connections that happen to be open
MS_SLACK = 20.0
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """The whole server at one moment."""

    time_s: float
    held_mib: Mapping[str, float]  # by what the process is; see processes.ProcessMemory
    resident_mib: Mapping[str, float]
    handles: int  # open files and sockets of all processes
    processes: int
    busy_blocks: int  # of KV, referenced
    num_blocks: int
    running: int
    waiting: int
    parked: int = 0
    parks: int = 0  # so far


@dataclass(frozen=True, slots=True)
class Trend:
    """One series. `per_hour` is the least squares slope after the warm-up.

    `resident` is a process's resident memory in the second and the last third, file pages that it shares with
    others included: stated, not judged, since other programs change it.
    """

    name: str
    unit: str
    before: float  # mean over the second third
    after: float  # mean over the last
    per_hour: float
    flat: bool
    resident: tuple[float, float] | None = None


def trend(
    name: str,
    unit: str,
    times: Sequence[float],
    values: Sequence[float],
    slack: float,
    tolerance: float = TOLERANCE,
) -> Trend:
    """Of at least six values in order of time."""
    assert len(values) >= 6, f"{name}: {len(values)} samples are too few"
    first, last = later_thirds(values)
    allowed = max(slack, tolerance * first)
    third = len(values) // 3
    slope = 3600.0 * least_squares(times[third:], values[third:])
    return Trend(name, unit, first, last, slope, last - first <= allowed)


def later_thirds(values: Sequence[float]) -> tuple[float, float]:
    """Means over the second and the last third."""
    third = len(values) // 3
    before, after = values[third : 2 * third], values[2 * third :]
    return sum(before) / len(before), sum(after) / len(after)


def memory_trend(
    name: str, times: Sequence[float], held: Sequence[float], resident: Sequence[float]
) -> Trend:
    """Judged by what is held, in MiB."""
    found = trend(f"memory, {name}", "MiB", times, held, MIB_SLACK)
    return replace(found, resident=later_thirds(resident))


def least_squares(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the line nearest to the points; 0 where all xs are one."""
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    if spread == 0.0:
        return 0.0
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread


def trends(
    samples: Sequence[Sample], ttft_ms: Sequence[tuple[float, float]], tpot_ms: Sequence[tuple[float, float]]
) -> list[Trend]:
    """Memory in all and by process, handles, processes, and latency as (time, value) of requests."""
    times = [sample.time_s for sample in samples]
    held = [sum(sample.held_mib.values()) for sample in samples]
    resident = [sum(sample.resident_mib.values()) for sample in samples]
    found = [memory_trend("all processes", times, held, resident)]
    for label in sorted({label for sample in samples for label in sample.held_mib}):
        held = [sample.held_mib.get(label, 0.0) for sample in samples]
        resident = [sample.resident_mib.get(label, 0.0) for sample in samples]
        found.append(memory_trend(label, times, held, resident))
    found.append(trend("file handles", "", times, [float(s.handles) for s in samples], HANDLE_SLACK))
    found.append(trend("processes", "", times, [float(s.processes) for s in samples], 0.5))
    for name, points in (("TTFT", ttft_ms), ("TPOT", tpot_ms)):
        at, values = [time for time, _ in points], [value for _, value in points]
        found.append(trend(name, "ms", at, values, MS_SLACK, tolerance=0.25))
    return found
