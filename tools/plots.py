"""Drawings of `tools.figures`: numbers in, a matplotlib Figure out, nothing read.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by colour-blind readers
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":")  # once the colours are used up
GREY, ALIGNED = "#666666", "#d55e00"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "legend.frameon": False,
}
RING: Any = {
    "linestyle": "",
    "marker": "o",
    "markersize": 9,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
    "zorder": 5,
}
PIXELS = 128  # of a picture in a panel of tokens, at least
# inches: a cell, the gaps between panels and between blocks, the rim, the headings
CELL, GAP, BLOCK_GAP, RIM, HEADING = 0.76, 0.06, 0.22, 0.12, 0.74
LOG_FROM = 10.0  # a positive quantity that spans more is drawn logarithmically


def style() -> AbstractContextManager[None]:
    """The look of all figures, to draw and to save within."""
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(STYLE)


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One run's pictures, N images each.

    Attributes:
      title: what the run is called.
      images: uint8 (N, H, W, 3); latent: colours (N, T, 3) of the latent's patches.
      blocks: {(block, t): colours (N, T, 3)}, ordered by block, then time.
      aligned: blocks that an alignment trains.
    """

    title: str
    images: np.ndarray
    latent: np.ndarray
    blocks: Mapping[tuple[int, float], np.ndarray]
    aligned: Sequence[int]


def montage(cells: np.ndarray) -> np.ndarray:
    """Square images (N, S, S, 3), uint8, in a column of uint8 pixels on white.

    Small ones are enlarged without smoothing.
    """
    side = cells.shape[1]
    cells = np.kron(cells, np.ones((1, -(-PIXELS // side), -(-PIXELS // side), 1)))
    gap = round(GAP / CELL * cells.shape[1])
    rows = np.pad(cells, ((0, 0), (0, gap), (0, 0), (0, 0)), constant_values=255)
    return np.concatenate(rows)[:-gap].astype(np.uint8)


def token_picture(colors: np.ndarray) -> np.ndarray:
    """Colours (N, T, 3) in [0, 1] of row-major tokens as `montage` of squares."""
    side = round(colors.shape[1] ** 0.5)
    cells = np.round(255 * colors).reshape(len(colors), side, side, 3)
    return montage(cells)


def tokens_figure(rows: Sequence[TokenRow]) -> Figure:
    """A band for each run; its columns: image, latent, every block at every time."""
    from matplotlib.figure import Figure

    keys = list(rows[0].blocks)
    lefts = [RIM, RIM + CELL + GAP]  # of the columns, inches
    for i, (block, _) in enumerate(keys):
        new = i == 0 or block != keys[i - 1][0]
        lefts.append(lefts[-1] + CELL + (BLOCK_GAP if new else GAP))
    count = len(rows[0].images)
    tall = count * (CELL + GAP) - GAP
    size = lefts[-1] + CELL + RIM, len(rows) * (HEADING + tall + RIM)
    figure = Figure(figsize=size)
    for i, row in enumerate(rows):
        bottom = size[1] - (i + 1) * (HEADING + tall) - i * RIM
        pictures = [montage(row.images), token_picture(row.latent)]
        pictures += [token_picture(colors) for colors in row.blocks.values()]
        names = ["image", "latent", *(f"t = {t:g}" for _, t in keys)]
        for left, picture, name in zip(lefts, pictures, names, strict=True):
            box = np.array([left, bottom, CELL, tall]) / np.tile(size, 2)
            axis = figure.add_axes(tuple(box))
            smooth = "auto" if name == "image" else "nearest"
            axis.imshow(picture, interpolation=smooth, aspect="auto")
            axis.set_axis_off()
            axis.set_title(name, size=8.5, pad=4)
        at = (RIM / size[0], (bottom + tall + HEADING - 0.1) / size[1])
        figure.text(*at, row.title, va="top", weight="bold", size=11)
        for block in dict.fromkeys(block for block, _ in keys):
            own = [x for x, k in zip(lefts[2:], keys, strict=True) if k[0] == block]
            aligned = block in row.aligned
            name = "block " if len(own) > 1 or not aligned else ""  # or too wide
            name += f"{block} (aligned)" if aligned else f"{block}"
            ends = own[0] / size[0], (own[-1] + CELL) / size[0]
            y = (bottom + tall + 0.25) / size[1]
            _heading(figure, ends, y, name, ALIGNED if aligned else GREY)
    return figure


def _heading(
    figure: Figure, ends: tuple[float, float], y: float, text: str, color: str
) -> None:
    """A rule over some columns with text on it, in figure coordinates."""
    from matplotlib.lines import Line2D

    figure.add_artist(Line2D(ends, (y, y), color=color, linewidth=1.4))
    above = y + 0.04 / figure.get_figheight()
    figure.text(sum(ends) / 2, above, text, ha="center", size=9, color=color)


@dataclasses.dataclass(frozen=True)
class Line:
    """One run in a plot.

    Attributes:
      label: of its group; the runs of one label are drawn thin and their mean thick.
      steps: what identifies a point between runs, rising; x, y: where it lies.
      marks: steps to ring.
    """

    label: str
    steps: np.ndarray
    x: np.ndarray
    y: np.ndarray
    marks: Sequence[int] = ()


def by_label(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each label, in order."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.label, []).append(line)
    return groups


def mean_line(lines: Sequence[Line]) -> Line:
    """The mean of x and of y over the steps that all lines have."""
    steps = functools.reduce(np.intersect1d, [line.steps for line in lines])
    at = [np.isin(line.steps, steps) for line in lines]
    x = np.mean([line.x[k] for line, k in zip(lines, at, strict=True)], axis=0)
    y = np.mean([line.y[k] for line, k in zip(lines, at, strict=True)], axis=0)
    return Line(lines[0].label, steps, x, y, lines[0].marks)


def draw_groups(axis: Axes, lines: Sequence[Line], marker: str = "") -> None:
    """Each label's runs thin and their mean thick; a single run as it is."""
    groups = by_label(lines)
    for i, (label, group) in enumerate(groups.items()):
        wide = 1 + 0.8 * (len(groups) - 1 - i) / len(
            groups
        )  # seen where lines coincide
        dash = DASHES[i // len(PALETTE) % len(DASHES)]
        look: Any = {"color": PALETTE[i % len(PALETTE)], "linestyle": dash}
        if len(group) > 1:
            for line in group:
                axis.plot(line.x, line.y, **look, linewidth=0.8, alpha=0.45)
        name = label if len(group) == 1 else f"{label} (mean of {len(group)} runs)"
        mean = mean_line(group)
        look |= {"linewidth": 1.6 * wide, "marker": marker, "markersize": 4 * wide}
        axis.plot(mean.x, mean.y, **look, label=name)
        if ring := np.isin(mean.steps, mean.marks).nonzero()[0].tolist():
            axis.plot(mean.x[ring], mean.y[ring], **RING)


def probe_figure(panels: Mapping[float, Sequence[Line]], note: str) -> Figure:
    """R^2 against the block, one panel a noise level; aligned blocks ringed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    width = max(4.6, 2.3 * len(panels) + 1.2)
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (t, lines) in zip(axes, panels.items(), strict=True):
        draw_groups(axis, lines, marker="o")
        axis.set_title(f"t = {t:g}")
        axis.set_xlabel("block")
        axis.tick_params(left=axis is axes[0])
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.xaxis.set_major_formatter(lambda x, _: "$x_t$" if x == 0 else f"{x:g}")
    lines = [line for group in panels.values() for line in group]
    low = min(0.0, *(float(line.y.min()) for line in lines))
    axes[0].set_ylim(low - 0.02, 1.02)
    axes[0].set_ylabel("R² of the clean latent")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(line.marks for line in lines):
        handles, labels = [*handles, Line2D([], [], **RING)], [*labels, "aligned block"]
    columns = min(len(labels), max(1, int(width / 2.4)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    figure.supxlabel(textwrap.fill(note, int(15 * width)), size=8, color=GREY)
    return figure


def curves_figure(
    lines: Sequence[Line],
    levels: Mapping[str, float],
    xlabel: str,
    ylabel: str,
    marker: str = "",
) -> Figure:
    """A metric's curves, and levels to compare with, dashed.

    The vertical axis is logarithmic where the values span more than LOG_FROM, but for
    those that rise towards their best: equal steps of a share are equally good.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    draw_groups(axis, lines, marker)
    for i, (name, level) in enumerate(levels.items()):
        look: Any = {"linestyle": (0, ((6, 3), (2, 2))[i % 2]), "linewidth": 1.2}
        axis.axhline(level, color=GREY, label=f"{name}: {level:.3g}", **look)
    values = np.concatenate([*(line.y for line in lines), [*levels.values()]])
    spans = values.min() > 0 and values.max() > LOG_FROM * values.min()
    if spans and lines[0].y[-1] < lines[0].y[0]:
        axis.set_yscale("log")
        if values.max() < 1000 * values.min():
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.set_xlim(left=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend()
    return figure
