"""Curves of a metric against step, as SVG text for the page that report.py writes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 200, 40, 8, 22  # of a drawing, SVG units
RIGHT = WIDTH - 8
POINTS = 240  # of a curve: more than its pixels only make the page heavy
MARKED = 40  # series of at most so many points show each

Series = tuple[np.ndarray, np.ndarray]  # steps, values; finite, steps rising
Show = Callable[[float], str]  # a value as text

count = itertools.count()


def short(value: float | None) -> str:
    """About three significant digits: 0.412, 1,234, 56.7k, 675M, 1e-4."""
    if value is None:
        return "\N{EN DASH}"
    size = abs(value)
    for unit, letter, least in ((1e9, "B", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= 0.9995 * least:
            digits = ".3g" if size < 99.95 * unit else ",.0f"
            return f"{value / unit:{digits}}{letter}"
    if 0 < size <= 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 999.5 else f"{value:.3g}"


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the log, shorter at the ends.

    Taken twice over half the width: a spike becomes a hump, not a plateau.
    """
    half = len(values) // 60
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[high] - sums[low]) / (high - low)
    return values


def thin(steps: np.ndarray, values: np.ndarray) -> Series:
    """At most POINTS points: the extremes of each stretch, so that spikes stay."""
    if len(steps) <= POINTS:
        return steps, values
    keep: set[int] = set()
    for part in np.array_split(np.arange(len(steps)), POINTS // 2):
        low, high = np.argmin(values[part]), np.argmax(values[part])
        keep |= {int(part[low]), int(part[high])}
    index = sorted(keep)
    return steps[index], values[index]


def ticks(low: float, high: float, most: int, log: bool = False) -> list[float]:
    """Round values in [low, high]: multiples of 1, 2 or 5, or powers of ten."""
    if log:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [10.0**p for p in powers[:: max(1, -(-len(powers) // most))]]
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * unit for m in (1, 2, 5, 10) if (high - low) / (m * unit) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def y_range(
    values: np.ndarray, level: float | None, zero: bool
) -> tuple[float, float, bool]:
    """Axis limits that a few spikes do not stretch, and whether it is logarithmic."""
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if level is not None:
        low, high = min(low, level), max(high, level)
    if zero:
        return min(0.0, low), max(high, 0.0) * 1.1 or 1.0, False
    if low > 0 and high / low > 50:
        return low / 1.2, high * 1.2, True
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin, False


@dataclasses.dataclass(frozen=True)
class Axes:
    """Where values lie in a curve's drawing."""

    last: float  # step at the right edge
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / self.last, 1)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            floor = low / 10  # keeps zero drawable, far below the frame
            low, high, value = np.log([low, high, max(value, floor)])
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * float(share), 1)

    def path(self, look: str, series: Series) -> str:
        points = (f"{self.x(s)},{self.y(v)}" for s, v in zip(*series, strict=True))
        return f'<polyline class="{look}" points="{" ".join(points)}"/>'

    def dots(self, series: Series) -> str:
        return "".join(
            f'<circle class="dot" cx="{self.x(s)}" cy="{self.y(v)}" r="3"/>'
            for s, v in zip(*series, strict=True)
        )

    def level(self, value: float, show: Show) -> str:
        y = self.y(value)
        # on the left, on the side with more room: curves end, not begin, near it
        text_y = y + 13 if y < HEIGHT / 2 else y - 5
        return (
            f'<line class="reference" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="label" x="{LEFT + 6}" y="{text_y}">real images '
            f"{escape(show(value))}</text>"
        )

    def grid(self, show: Show) -> str:
        """Horizontal rules with their values, and steps below."""
        parts = []
        levels = ticks(self.low, self.high, 5, self.log)
        labels = [escape(show(v)).replace(".0%", "%") for v in levels]
        if len(set(labels)) < len(labels):  # a range too narrow for three digits
            labels = [f"{v:.6g}" for v in levels]
        for v, label in zip(levels, labels, strict=True):
            y = self.y(v)
            parts.append(
                f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>'
            )
        for v in ticks(0, self.last, 5):
            anchor = "end" if self.x(v) > RIGHT - 12 else "middle"
            parts.append(
                f'<text x="{self.x(v)}" y="{HEIGHT - 6}" text-anchor="{anchor}">'
                f"{short(v)}</text>"
            )
        return f'<g class="grid">{"".join(parts)}</g>'


def hover_points(axes: Axes, series: Series, show: Show) -> str:
    """What report.js shows under the pointer: x|y|step|value;..."""
    rows = zip(*thin(*series), strict=True)
    return escape(
        ";".join(f"{axes.x(s)}|{axes.y(v)}|{s:,.0f}|{show(v)}" for s, v in rows)
    )


def curve(
    title: str,
    series: Series | None,
    last: float,
    show: Show,
    zero: bool = False,
    smoothed: bool = False,
    level: float | None = None,
) -> str:
    """A figure: the raw line, a smoothed one over it, a level to compare with.

    Args:
      series: None if nothing was logged.
      last: step at the right edge, the same for all curves of a page.
      zero: whether the axis starts at 0.
      level: of real images, drawn dashed.
    """
    head = f"<figcaption><span>{escape(title)}</span>"
    if series is None:
        nothing = '<p class="missing">Not logged yet.</p>'
        return f'<figure class="chart">{head}</figcaption>{nothing}</figure>'
    steps, values = series
    axes = Axes(max(last, 1), *y_range(values, level, zero))
    mean = smooth(values) if smoothed else values
    drawn = axes.path("raw", thin(steps, values)) if smoothed else ""
    drawn += axes.path("curve", thin(steps, mean))
    if len(steps) <= MARKED:
        drawn += axes.dots(series)
    drawn += "" if level is None else axes.level(level, show)
    points = hover_points(axes, (steps, mean), show)
    name, value = f"plot{next(count)}", escape(show(float(mean[-1])))
    return (
        f'<figure class="chart" data-points="{points}">'
        f"{head}<output>{value}</output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}'
        f' against step: {value} at step {steps[-1]:,.0f}">{axes.grid(show)}'
        f'<clipPath id="{name}"><rect x="{LEFT}" width="{WIDTH - LEFT}" '
        f'height="{HEIGHT - BOTTOM + 4}"/></clipPath>'
        f'<g clip-path="url(#{name})">{drawn}</g><g class="cursor">'
        f'<line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle r="3.5"/></g></svg></figure>'
    )
