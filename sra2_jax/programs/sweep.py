"""FID over guidance scales and intervals: python -m sra2_jax sweep RUN --reference=REF.

Of classifier-free guidance, or with --of=head_guidance of that by the head of SRA 2.
Every cell samples the same noise and labels. Writes OUT/sweep.json, sweep.md (a table)
and sweep.png (a heat map) after each cell; run again, it goes on with what is missing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from etils import epath

from sra2_jax import generator, runtime
from sra2_jax.command import Parser
from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS, compare
from sra2_jax.metrics.features import Features, make_features
from sra2_jax.metrics.sets import ImageSet, open_images
from sra2_jax.programs.evaluate import add_feature_arguments
from sra2_jax.programs.sample import add_run_arguments
from sra2_jax.storage import read_json, write_json

FILE = "sweep.json"
NAMES = ("guidance", "guidance_low", "guidance_high")  # of a cell
Interval = tuple[float, float]
Cell = tuple[float, float, float]  # of NAMES
Results = dict[Any, dict[str, float]]  # metrics of the finished cells


def scales(text: str) -> list[float]:
    """argparse's type of "1,1.5,2", rising."""
    return sorted({float(part) for part in text.split(",")})


def intervals(text: str) -> list[Interval]:
    """argparse's type of "0:1,0:0.7": low, high, in the order given."""
    pairs = [part.split(":") for part in text.split(",")]
    return list(dict.fromkeys((float(low), float(high)) for low, high in pairs))


def cell_of(scale: float, interval: Interval) -> Cell:
    """Scale 1 is no guidance, whatever the interval: one cell."""
    return (scale, 0.0, 1.0) if scale == 1 else (scale, *interval)


def guidance_of(cell: Cell, kind: str) -> dict[str, float]:
    """What a cell changes of the config; kind: "guidance" or "head_guidance"."""
    keys = (name.replace("guidance", f"sampling.{kind}") for name in NAMES)
    return dict(zip(keys, cell, strict=True))


def run_cell(
    generate: generator.Generator,
    features: Features,
    reference: compare.Summary,
    cell: Cell,
    count: int,
) -> dict[str, float]:
    """The metrics of `count` samples with a guidance."""
    indices, side = np.arange(count), generate.config.data.resolution
    labels = generator.draw_labels(generate.config, indices)
    name, shape = f"guidance {cell}", (count, side, side, 3)
    images = ImageSet(name, shape, lambda _: generate(indices, labels), labels)
    keep = count if reference.kept is not None else 0
    found = compare.summarise(features, images, generate.batch, keep)
    return compare.compare(features, found, reference)


def table(results: Results, settings: dict[str, Any]) -> str:
    """The cells as a Markdown table, the smallest distance in bold."""
    names = list(next(iter(results.values())))
    best = min(results, key=lambda cell: results[cell][names[0]])
    lines = [
        "{num_samples:,} samples a cell of {of}, the same noise and labels in each; "
        "seed {seed}, {method}, {steps} steps, {labels} labels, {weights} weights of "
        "step {step:,}; {features}.\n".format(**settings),
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


def draw(
    path: epath.Path,
    results: Results,
    guidance: list[float],
    interval: list[Interval],
    samples: int,
) -> None:
    """A heat map of the distance: darker is better; what is missing is left blank."""
    from matplotlib.figure import Figure

    metric = next(iter(next(iter(results.values()))))
    cells = [[results.get(cell_of(s, i), {}) for s in guidance] for i in interval]
    values = np.array([[cell.get(metric, math.nan) for cell in row] for row in cells])
    size = 1.9 + 0.95 * len(guidance), 1.3 + 0.6 * len(interval)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    # Steps of equal ratio look equal: distances span powers of ten.
    logs = np.log(np.maximum(values, 1e-12))
    axis.imshow(logs, cmap="viridis", alpha=0.5, aspect="auto")
    for i, j in np.argwhere(np.isfinite(values)).tolist():
        weight = "bold" if values[i, j] == np.nanmin(values) else "normal"
        middle: Any = {"ha": "center", "va": "center", "weight": weight}
        axis.text(j, i, f"{values[i, j]:.3g}", **middle)
    axis.set_xticks(range(len(guidance)), [f"{scale:g}" for scale in guidance])
    axis.set_yticks(range(len(interval)), [f"{a:g} to {b:g}" for a, b in interval])
    axis.set(xlabel="guidance scale, 1 = none", ylabel="interval of t, 0 = data")
    axis.set_title(f"{METRICS[metric][0]}, {samples:,} samples", fontsize=10)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add = parser.add_argument
    add("--reference", required=True, metavar="REF", help="as that of evaluate")
    add("--out", required=True, metavar="FOLDER", help="for table, picture and JSON")
    guidance: Any = {"type": scales, "default": "1,1.4,1.8,2.2"}
    add("--guidance", **guidance, help="scales (%(default)s)")
    kinds: Any = {"choices": ("guidance", "head_guidance"), "default": "guidance"}
    add("--of", **kinds, help="what to sweep (%(default)s)")
    interval: Any = {"type": intervals, "default": "0:1,0:0.7"}
    add("--interval", **interval, help="low:high, t = 0 is data (%(default)s)")
    add("--num", type=int, default=5000, help="samples a cell (%(default)s)")
    add_feature_arguments(parser)
    a = parser.parse_args()
    if a.num < 2:
        raise UserError(f"--num={a.num}: must be at least 2")
    config = generator.read_settings(a.workdir, a.overrides)
    cells = dict.fromkeys(cell_of(s, i) for s in a.guidance for i in a.interval)
    for cell in cells:  # fails before anything is loaded
        config.override(guidance_of(cell, a.of))
    config = config.override(guidance_of(max(cells), a.of))  # loads what all need
    out = epath.Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    runtime.join(a)
    held = open_images(a.reference, a.resolution, a.split)
    generate = generator.open_run(a.workdir, config, a.weights, a.step)
    batch, mesh = generate.batch, generate.program.mesh
    features = make_features(a.features, vars(a).get(a.features, ""), mesh, batch)
    swept = [name.replace("guidance", a.of) for name in NAMES]
    settings = {k: v for k, v in generate.settings.items() if k not in swept}
    settings |= {"of": a.of, "num_samples": a.num, "reference": a.reference}
    settings |= features.facts
    done: list[dict[str, Any]] = []  # the finished cells, as in the file
    if (out / FILE).exists():
        saved = read_json(out / FILE)
        generator.refuse_others(out / FILE, saved["settings"], settings)
        done = saved["cells"]
    results = {tuple(c[name] for name in NAMES): c["metrics"] for c in done}
    reference = compare.summarise_reference(features, held, batch)
    for cell in cells:
        if cell not in results:
            guided = generate.override(guidance_of(cell, a.of))
            results[cell] = run_cell(guided, features, reference, cell, a.num)
            done.append(dict(zip(NAMES, cell, strict=True), metrics=results[cell]))
        if jax.process_index() == 0:
            write_json(out / FILE, {"settings": settings, "cells": done})
            (out / "sweep.md").write_text(table(results, settings))
            draw(out / "sweep.png", results, a.guidance, a.interval, a.num)
    if jax.process_index() == 0:
        print(table(results, settings))
        print(f"wrote {out / 'sweep.md'}, sweep.png, {FILE}")
    runtime.part()
