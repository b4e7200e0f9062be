"""Plots as inline SVG: axes with round ticks, lines, bars and stacked areas. Standard library only, pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b")
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 40
MAX_POINTS = 1_500  # of a line; more than a screen has columns


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `ys` may hold None: a gap. A bar is `step` wide."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    kind: Literal["line", "bars", "area", "points"] = "line"
    step: float = 1.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A dashed line across the plot: at an x, or at a y."""

    label: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """Data to pixels."""

    x0: float
    x1: float
    y1: float  # the y axis begins at 0

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, self.y1) / self.y1


def plot(title: str, x_label: str, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """One <svg>. Areas are stacked in the order given. Says so where there is nothing to show."""
    shown = [one for one in series if any(y is not None for y in one.ys)]
    if not shown:
        return _empty(title)
    frame = _frame(shown, marks)
    parts = [_open(title), *_axes(frame, x_label)]
    floor: list[float] = []
    for i, one in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        if one.kind == "area":
            base = floor or [0.0] * len(one.xs)
            floor = [b + (y or 0.0) for b, y in zip(base, one.ys, strict=True)]
            parts.append(_area(frame, one.xs, base, floor, colour))
        else:
            parts.append(_DRAW[one.kind](frame, one, colour))
    parts += [_mark(frame, mark, TOP + 10 + 12 * i) for i, mark in enumerate(marks)]
    parts += _legend([one.label for one in shown])
    parts.append("</svg>")
    return "".join(parts)


def _frame(shown: Sequence[Series], marks: Sequence[Mark]) -> Frame:
    xs = [x for one in shown for x in one.xs]
    xs += [one.xs[-1] + one.step for one in shown if one.kind == "bars"]
    xs += [mark.x for mark in marks if mark.x is not None]
    stacks = [one for one in shown if one.kind == "area"]
    tops = [sum(one.ys[i] or 0.0 for one in stacks) for i in range(len(stacks[0].xs))] if stacks else []
    ys = [y for one in shown if one.kind != "area" for y in one.ys if y is not None] + tops
    ys += [mark.y for mark in marks if mark.y is not None]
    x0, x1 = min(xs), max(xs)
    return Frame(x0, x1 if x1 > x0 else x0 + 1.0, (max(ys) or 1.0) * 1.05)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between the two, about `count`."""
    span = max(high - low, 1e-12)
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 1.5k, 2M, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _open(title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<text x="{LEFT}" y="16" class="title">{escape(title)}</text>'
    )


def _empty(title: str) -> str:
    return _open(title) + f'<text x="{LEFT}" y="{HEIGHT / 2}" class="tick">no data</text></svg>'


def _axes(frame: Frame, x_label: str) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(0.0, frame.y1):
        y = frame.y(value)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{number(value)}</text>')
    for value in ticks(frame.x0, frame.x1, 7):
        x = frame.x(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" class="tick middle">{number(value)}</text>')
    parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="tick middle">{escape(x_label)}</text>')
    return parts


def _line(frame: Frame, one: Series, colour: str) -> str:
    stride = max(1, len(one.xs) // MAX_POINTS)
    path, pen = [], "M"
    for x, y in list(zip(one.xs, one.ys, strict=True))[::stride]:
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
    return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'


def _points(frame: Frame, one: Series, colour: str) -> str:
    dots = [
        f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" fill="{colour}">'
        f"<title>{number(x)}: {number(y)}</title></circle>"
        for x, y in zip(one.xs, one.ys, strict=True)
        if y is not None
    ]
    return _line(frame, one, colour) + "".join(dots)


def _bars(frame: Frame, one: Series, colour: str) -> str:
    base = frame.y(0.0)
    parts = []
    for x, y in zip(one.xs, one.ys, strict=True):
        if not y:
            continue
        left, top = frame.x(x), frame.y(y)
        width = max(0.5, frame.x(x + one.step) - left - 0.5)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{base - top:.1f}"'
            f' fill="{colour}" fill-opacity=".75"><title>{number(x)}: {number(y)}</title></rect>'
        )
    return "".join(parts)


def _area(
    frame: Frame, xs: Sequence[float], below: Sequence[float], above: Sequence[float], colour: str
) -> str:
    there = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(xs, above, strict=True)]
    back = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(xs, below, strict=True)][::-1]
    return f'<path d="M{"L".join(there + back)}Z" fill="{colour}" fill-opacity=".7"/>'


def _mark(frame: Frame, mark: Mark, label_y: float) -> str:
    if mark.x is not None:
        x = frame.x(mark.x)
        side, anchor = (3, "") if x < 0.8 * WIDTH else (-3, " end")
        return (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="mark"/>'
            f'<text x="{x + side:.1f}" y="{label_y:.0f}" class="tick{anchor}">{escape(mark.label)}</text>'
        )
    y = frame.y(mark.y or 0.0)
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="mark"/>'
        f'<text x="{LEFT + 4}" y="{y - 3:.1f}" class="tick">{escape(mark.label)}</text>'
    )


def _legend(labels: Sequence[str]) -> list[str]:
    if len(labels) < 2:
        return []
    parts, x = [], float(WIDTH - RIGHT - sum(7 * len(label) + 22 for label in labels))
    for i, label in enumerate(labels):
        parts.append(f'<rect x="{x:.0f}" y="8" width="10" height="10" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="17" class="tick">{escape(label)}</text>')
        x += 7 * len(label) + 22
    return parts


_DRAW = {"line": _line, "points": _points, "bars": _bars}
