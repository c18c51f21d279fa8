"""Curves of a metric against the step: read from a log's rows, drawn as SVG text."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter1d

from sra2_jax.run import number

WIDTH, HEIGHT = 360, 200  # of a drawing, SVG units
MARKED = 40  # series of at most so many points show each
# report.css has these colours, for light and dark, under their names
COLORS = {"accent": "#1d5c9e", "line": "#e3e0d9", "soft": "#5f646d"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sra2",  # the same page every time
    "path.simplify_threshold": 1.0,  # more than its pixels only make the page heavy
    "font.size": 10.5,
}
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
    """Centred running mean over about a twentieth of the log.

    Taken twice over half the width: a spike becomes a hump, not a plateau.
    """
    width = 2 * (len(values) // 60) + 1
    return uniform_filter1d(uniform_filter1d(values, width), width)


def limits(values: np.ndarray, levels: list[float]) -> tuple[float, float]:
    """Of the axis: from 0 where that is not far; a few spikes do not stretch it."""
    ends = [*np.percentile(values, (0.5, 99.5)), *levels]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or abs(high) or 1.0
    return 0.0 if 0 <= low <= high / 3 else low - margin, high + margin


def draw(series: Series, last: float, levels: list[float]) -> str:
    """The inside of an SVG element: the raw line thin, its mean bold, levels dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    steps, values = series
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH / 72, HEIGHT / 72), facecolor="none")
        axis = figure.add_axes((0.135, 0.11, 0.815, 0.85), frame_on=False)
        accent, line, soft = COLORS.values()
        axis.plot(steps, values, color=accent, linewidth=1, alpha=0.35)
        look: Any = {"marker": "o" if len(steps) <= MARKED else "", "markersize": 4}
        axis.plot(steps, smooth(values), color=accent, linewidth=1.75, **look)
        for level in levels:  # labelled on the left: curves end on the right
            axis.axhline(level, color=soft, linewidth=1.25, linestyle="--")
            words = f" real images {short(level)}"
            axis.text(0, level, words, color=soft, va="bottom")
        axis.grid(axis="y", color=line)
        axis.tick_params(length=0, colors=soft)
        axis.locator_params(nbins=5, steps=[1, 2, 5, 10])
        axis.xaxis.set_major_formatter(lambda step, _: short(step))
        axis.yaxis.set_major_formatter("{x:.6g}")
        axis.set(xlim=(0, 1.02 * max(last, 1)), ylim=limits(values, levels))
        axis.set_axisbelow(True)
        file = io.StringIO()
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    drawn = file.getvalue().partition("</defs>")[2].removesuffix("</svg>\n")
    for name, color in COLORS.items():
        drawn = drawn.replace(color, f"var(--{name})")
    return re.sub(r' id="\w+_\d+"', "", drawn)


def curve(
    title: str, series: Series | None, last: float, level: float | None = None
) -> str:
    """A figure: the raw line, a smoothed one over it, a level to compare with, dashed.

    series: None if nothing was logged. last: step at the right edge.
    """
    end, body = "", '<p class="missing">Not logged yet.</p>'
    if series is not None:
        end = short(smooth(series[1])[-1])
        body = (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(title)} against step: {end} at the end">'
            f"{draw(series, last, [] if level is None else [level])}</svg>"
        )
    head = f"<figcaption>{escape(title)}<output>{end}</output></figcaption>"
    return f'<figure class="chart">{head}{body}</figure>'
