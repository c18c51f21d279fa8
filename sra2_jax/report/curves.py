"""Curves of a metric against the step: read from a log's rows, drawn as SVG text."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from sra2_jax.run import number

WIDTH, HEIGHT = 360, 200  # of a drawing, SVG units
LEFT, RIGHT, TOP, BOTTOM = 48, 342, 8, 178  # of its frame
POINTS = 240  # of a curve: more than its pixels only make the page heavy
MARKED = 40  # series of at most so many points show each

Show = Callable[[float], str]  # a value as text
Series = tuple[np.ndarray, np.ndarray]  # steps, values; finite, steps rising


def read_series(rows: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """Each metric's series. Of a step logged twice (a resumed run) the later wins."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        for key in row.keys() - {"step"}:
            if (value := number(row, key)) is not None:
                found.setdefault(key, {})[row["step"]] = value
    tables = {key: np.array(sorted(by.items()), float) for key, by in found.items()}
    return {key: (table[:, 0], table[:, 1]) for key, table in tables.items()}


def short(value: float | None) -> str:
    """Three significant digits: 0.412, 1.23k, 675M, 0.0001."""
    if value is None:
        return "\N{EN DASH}"
    value = float(f"{value:.3g}")
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


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
    parts = np.array_split(np.arange(len(steps)), POINTS // 2)
    ends = (np.argmin, np.argmax)
    index = sorted({int(part[end(values[part])]) for part in parts for end in ends})
    return steps[index], values[index]


def ticks(low: float, high: float) -> np.ndarray:
    """Up to six multiples in [low, high] of 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(m * unit for m in (1, 2, 5, 10) if (high - low) / (m * unit) <= 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return np.arange(first, last + 1) * step


class Axes:
    """Places of points in a drawing. The axis of values begins at 0 where that is not
    far, and a few spikes do not stretch it: they are cut off."""

    def __init__(self, last: float, values: np.ndarray, levels: list[float]) -> None:
        ends = [*np.percentile(values, (0.5, 99.5)).tolist(), *levels]
        low, high = min(ends), max(ends)
        margin = 0.06 * (high - low) or abs(high) or 1.0
        self.values = 0.0 if 0 <= low <= high / 3 else low - margin, high + margin
        self.steps = 0.0, max(last, 1.0)

    def places(self, steps: Any, values: Any) -> list[tuple[float, float]]:
        x = np.interp(steps, self.steps, (LEFT, RIGHT)).round(1).tolist()
        y = np.interp(values, self.values, (BOTTOM, TOP)).round(1).tolist()
        return list(zip(x, y, strict=True))

    def line(self, look: str, series: Series) -> str:
        points = " ".join(f"{x},{y}" for x, y in self.places(*series))
        return f'<polyline class="{look}" points="{points}"/>'

    def dots(self, series: Series) -> str:
        dot = '<circle class="dot" cx="{}" cy="{}" r="3"/>'
        return "".join(dot.format(*place) for place in self.places(*series))

    def grid(self, show: Show) -> str:
        """Horizontal rules with their values, and steps below."""
        marks, steps = ticks(*self.values), ticks(*self.steps)
        labels = [show(value) for value in marks]
        if len(set(labels)) < len(labels):  # a range too narrow for three digits
            labels = [f"{value:.6g}" for value in marks]
        drawn = ""
        for label, (_, y) in zip(labels, self.places(0 * marks, marks), strict=True):
            drawn += (
                f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/><text '
                f'x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{escape(label)}</text>'
            )
        for step, (x, _) in zip(steps, self.places(steps, steps), strict=True):
            drawn += (
                f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="middle">'
                f"{short(step)}</text>"
            )
        return f'<g class="grid">{drawn}</g>'

    def level(self, value: float, label: str) -> str:
        """Of real images. On the left: curves end, not begin, near it."""
        [(_, y)] = self.places([0], [value])
        return (
            f'<line class="reference" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="label" x="{LEFT + 6}" y="{y - 5}">real images '
            f"{escape(label)}</text>"
        )


def curve(
    title: str,
    series: Series | None,
    last: float,
    show: Show = short,
    level: float | None = None,
) -> str:
    """A figure: the raw line, a smoothed one over it, a level to compare with, dashed.

    series: None if nothing was logged. last: step at the right edge.
    """
    head = f"<figcaption><span>{escape(title)}</span>"
    if series is None:
        nothing = '<p class="missing">Not logged yet.</p>'
        return f'<figure class="chart">{head}</figcaption>{nothing}</figure>'
    steps, values = series
    axes = Axes(last, values, [] if level is None else [level])
    mean = thin(steps, smooth(values))
    drawn = axes.grid(show) + axes.line("raw", thin(*series)) + axes.line("curve", mean)
    drawn += axes.dots(series) if len(steps) <= MARKED else ""
    drawn += "" if level is None else axes.level(level, show(level))
    hover = ";".join(  # what report.js shows under the pointer
        f"{x}|{y}|{step:,.0f}|{show(value)}"
        for (x, y), step, value in zip(axes.places(*mean), *mean, strict=True)
    )
    end = escape(show(float(mean[1][-1])))
    return (
        f'<figure class="chart" data-points="{escape(hover)}">'
        f"{head}<output>{end}</output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}'
        f' against step: {end} at step {steps[-1]:,.0f}">{drawn}<g class="cursor">'
        f'<line y1="{TOP}" y2="{BOTTOM}"/><circle r="3.5"/></g></svg></figure>'
    )
