"""FID over guidance scales and intervals: python -m sra2_jax sweep RUN --reference=REF.

Every cell samples the same noise and labels, so that cells differ by their guidance
alone. Writes OUT/sweep.json, sweep.md (a table) and sweep.png (a heat map) after each
cell; run again, it goes on with the cells that are missing. Runs without TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sra2_jax import runtime
from sra2_jax.command import Parser
from sra2_jax.errors import UserError
from sra2_jax.generator import (
    Generator,
    draw_labels,
    open_run,
    read_settings,
    refuse_others,
)
from sra2_jax.metrics import METRICS
from sra2_jax.metrics.compare import (
    Summary,
    compare,
    summarise,
    summarise_reference,
    watched,
)
from sra2_jax.metrics.features import Features, make_features
from sra2_jax.metrics.sets import open_images
from sra2_jax.programs.evaluate import add_feature_arguments
from sra2_jax.programs.sample import add_run_arguments
from sra2_jax.run import as_json, read_json, write_whole

Interval = tuple[float, float]
FILE = "sweep.json"
NAMES = ("guidance", "guidance_low", "guidance_high")
Cell = tuple[float, float, float]  # of those
Results = dict[Cell, dict[str, float]]  # metrics of the finished cells
GREY, BEST = "#666666", "#d55e00"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
}


def parse_scales(text: str) -> list[float]:
    """ "1,1.5,2" to numbers, rising. Raises UserError."""
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        scales = []
    if not scales or not all(math.isfinite(s) for s in scales):
        raise UserError(f"--guidance={text}: give scales as 1,1.5,2")
    return scales


def parse_intervals(text: str) -> list[Interval]:
    """ "0:1,0:0.7" to pairs low, high, in the order given. Raises UserError."""
    pairs: list[Interval] = []
    for part in text.split(","):
        low, colon, high = part.partition(":")
        try:
            pair = float(low), float(high)
        except ValueError:
            pair = math.nan, math.nan
        if not (colon and 0 <= pair[0] < pair[1] <= 1):
            raise UserError(
                f"--interval={text}: give intervals low:high with 0 <= low < high <= "
                "1, as 0:1,0:0.7 (t = 0 is data)"
            )
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def cell_of(scale: float, interval: Interval) -> Cell:
    """Scale 1 is no guidance, whatever the interval: one cell."""
    return (scale, 0.0, 1.0) if scale == 1 else (scale, *interval)


def guidance_of(cell: Cell) -> dict[str, float]:
    """What a cell changes of the config."""
    return {f"sampling.{n}": value for n, value in zip(NAMES, cell, strict=True)}


def read_finished(path: epath.Path, settings: dict[str, Any]) -> Results:
    """The cells of an earlier call.

    Raises:
      UserError: it had other settings, or its file cannot be read.
    """
    if not path.exists():
        return {}
    saved = read_json(path)
    refuse_others(path, saved["settings"], settings)
    return {tuple(c[name] for name in NAMES): c["metrics"] for c in saved["cells"]}


def run_cell(
    generate: Generator, features: Features, reference: Summary, cell: Cell, count: int
) -> dict[str, float]:
    """The metrics of `count` samples with a guidance."""
    generate = generate.override(guidance_of(cell))
    indices = np.arange(count)
    labels = draw_labels(generate.config, indices)
    name = "guidance {:g} in [{:g}, {:g}]".format(*cell)
    images = watched(generate(indices, labels), count, name)
    keep = count if reference.kept is not None else 0
    summary = summarise(features, images, name, total=count, keep=keep, labels=labels)
    return compare(features, summary, reference)


def table(results: Results, settings: dict[str, Any]) -> str:
    """The cells as a Markdown table, the smallest distance in bold."""
    names = list(next(iter(results.values())))
    best = min(results, key=lambda cell: results[cell][names[0]])
    lines = [
        f"{settings['num_samples']:,} samples a cell, the same noise and labels in "
        f"each; seed {settings['seed']}, {settings['method']}, {settings['steps']} "
        f"steps, {settings['labels']} labels, {settings['weights']} weights of step "
        f"{settings['step']:,}; {settings['features']}.",
        "",
        f"| guidance | interval | {' | '.join(METRICS[n][0] for n in names)} |",
        "|" + "---|" * (2 + len(names)),
    ]
    for cell in sorted(results):
        scale, low, high = cell
        values = [f"{results[cell][name]:.4g}" for name in names]
        if cell == best:
            values[0] = f"**{values[0]}**"
        interval = "none" if scale == 1 else f"{low:g} to {high:g}"
        lines.append(f"| {' | '.join([f'{scale:g}', interval, *values])} |")
    return "\n".join(lines) + "\n"


def write(
    out: epath.Path,
    results: Results,
    settings: dict[str, Any],
    scales: Sequence[float],
    intervals: Sequence[Interval],
) -> None:
    """sweep.json, sweep.md and sweep.png of the finished cells."""
    cells = [
        dict(zip(NAMES, cell, strict=True)) | {"metrics": metrics}
        for cell, metrics in results.items()
    ]
    write_whole(out / FILE, as_json({"settings": settings, "cells": cells}))
    (out / "sweep.md").write_text(table(results, settings))
    metric = next(iter(next(iter(results.values()))))
    unknown = {metric: math.nan}
    values = np.array(
        [
            [results.get(cell_of(s, interval), unknown)[metric] for s in scales]
            for interval in intervals
        ]
    )
    title = f"{METRICS[metric][0]}, {settings['num_samples']:,} samples"
    draw(out / "sweep.png", values, scales, intervals, title)


def draw(
    path: epath.Path,
    values: np.ndarray,
    scales: Sequence[float],
    intervals: Sequence[Interval],
    title: str,
) -> None:
    """Write a heat map as a PNG: a distance (rows: intervals, columns: guidance
    scales), darker is better, the best one framed; NaN: not measured yet."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = values.shape
    with matplotlib.rc_context(STYLE):
        size = 1.9 + 0.95 * columns, 1.3 + 0.6 * rows
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        # steps of equal ratio look equal: distances span powers of ten
        logs = np.log(np.maximum(values, 1e-12))
        axis.imshow(logs, cmap="viridis", aspect="auto")
        bright = np.nanmin(logs) + 0.6 * (np.nanmax(logs) - np.nanmin(logs))
        best = divmod(int(np.nanargmin(values)), columns)
        for i, j in np.argwhere(np.isfinite(values)).tolist():
            look: Any = {"color": "black" if logs[i, j] > bright else "white"}
            look["weight"] = "bold" if (i, j) == best else "normal"
            axis.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", **look)
        corner = best[1] - 0.48, best[0] - 0.48
        frame: Any = {"fill": False, "edgecolor": BEST, "linewidth": 2}
        axis.add_patch(Rectangle(corner, 0.96, 0.96, **frame))
        names = [f"{s:g}" if s != 1 else "1 (none)" for s in scales]
        axis.set_xticks(range(columns), names)
        axis.set_yticks(range(rows), [f"{a:g} to {b:g}" for a, b in intervals])
        axis.tick_params(length=0)
        axis.set_xlabel("guidance scale")
        axis.set_ylabel("interval of t, 0 = data")
        axis.set_title(title)
        with path.open("wb") as file:
            figure.savefig(file, format="png", dpi=150)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add = parser.add_argument
    add("--reference", required=True, metavar="REF", help="as that of evaluate")
    add("--out", required=True, metavar="FOLDER", help="for table, picture and JSON")
    add("--guidance", default="1,1.4,1.8,2.2", help="scales (%(default)s)")
    add("--interval", default="0:1,0:0.7", help="low:high, t = 0 is data (%(default)s)")
    add("--num", type=int, default=5000, help="samples a cell (%(default)s)")
    add_feature_arguments(parser)
    a = parser.parse_args()
    scales, intervals = parse_scales(a.guidance), parse_intervals(a.interval)
    if a.num < 2:
        raise UserError(f"--num={a.num}: must be at least 2")
    config = read_settings(a.workdir, a.overrides)
    cells = {cell_of(s, i): None for s in scales for i in intervals}  # each once
    for cell in cells:  # fails before anything is loaded
        config.override(guidance_of(cell))
    runtime.join(a)
    held = open_images(a.reference, a.resolution, a.split)
    generate = open_run(a.workdir, config, a.weights, a.step)
    batch, mesh = generate.batch, generate.program.mesh
    features = make_features(a.features, a.inception, mesh, batch)
    settings = {k: v for k, v in generate.settings.items() if k not in NAMES}
    settings |= {"num_samples": a.num, "reference": a.reference, **features.facts}
    out = epath.Path(a.out)
    results = read_finished(out / FILE, settings)
    out.mkdir(parents=True, exist_ok=True)
    reference = summarise_reference(features, held, batch, manifold=True)
    for cell in cells:
        if cell not in results:
            results[cell] = run_cell(generate, features, reference, cell, a.num)
        if jax.process_index() == 0:
            write(out, results, settings, scales, intervals)
    if jax.process_index() == 0:
        print(table(results, settings))
        print(f"wrote {out / 'sweep.md'}, sweep.png, {FILE}")
    runtime.part()
