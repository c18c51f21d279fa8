"""FID over guidance scales and intervals: python -m sra2_jax sweep RUN --reference=REF.

Every cell samples the same noise and labels, so that cells differ by their guidance
alone. Writes OUT/sweep.json, sweep.md (a table) and sweep.png (a heat map) after each
cell; run again, it goes on with the cells that are missing. Runs without TensorFlow.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sra2_jax import config as configuration
from sra2_jax import distributed
from sra2_jax.command import run_program
from sra2_jax.errors import UserError
from sra2_jax.generate import batch_size, draw_labels
from sra2_jax.metrics.archive import open_reference
from sra2_jax.metrics.compare import Summary, compare, summarise, summarise_reference
from sra2_jax.metrics.features import Features, make_features
from sra2_jax.programs.evaluate import SHOWN, add_feature_arguments
from sra2_jax.programs.subject import (
    Subject,
    add_arguments,
    open_subject,
    read_settings,
)
from tools import plots

Interval = tuple[float, float]
Cell = dict[str, Any]
FILE = "sweep.json"
NAMES = ("guidance", "guidance_low", "guidance_high")


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


def cells_of(scales: Sequence[float], intervals: Sequence[Interval]) -> list[Cell]:
    """One cell a pair; scale 1 is no guidance, whatever the interval: one cell."""
    found: list[Cell] = []
    for scale in scales:
        for low, high in intervals:
            if scale == 1:
                low, high = 0.0, 1.0
            cell = dict(zip(NAMES, (scale, low, high), strict=True))
            if cell not in found:
                found.append(cell)
    return found


def find(cells: Sequence[Cell], wanted: Cell) -> Cell | None:
    """The finished cell of a guidance."""
    for cell in cells:
        if all(cell[name] == wanted[name] for name in NAMES):
            return cell
    return None


def read_finished(path: epath.Path, settings: dict[str, Any]) -> list[Cell]:
    """The cells of an earlier call.

    Raises:
      UserError: it had other settings, or its file cannot be read.
    """
    if not path.exists():
        return []
    try:
        saved = json.loads(path.read_text())
        cells: list[Cell] = saved["cells"]
        before = saved["settings"]
        assert all(isinstance(cell["metrics"], dict) for cell in cells)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read: move it or use another --out") from (
            error
        )
    now = json.loads(json.dumps(settings))
    for key in sorted((now.keys() | before.keys()) - {"versions", "batch_size"}):
        if now.get(key) != before.get(key):
            raise UserError(
                f"{path} is a sweep with other settings: {key} is "
                f"{before.get(key)!r} there, {now.get(key)!r} now: use another --out"
            )
    return cells


def run_cell(
    subject: Subject, features: Features, reference: Summary, cell: Cell, count: int
) -> dict[str, float]:
    """The metrics of `count` samples with a guidance."""
    config = subject.config.copy_and_resolve_references()
    config.sampling.update(cell)
    generate = subject.make(config)
    indices = np.arange(count)
    labels = draw_labels(config, indices)
    name = "guidance {:g} in [{:g}, {:g}]".format(*(cell[n] for n in NAMES))
    batches = tqdm(
        generate(subject.params, indices, labels),
        total=-(-count // batch_size(config, subject.mesh)),
        unit="batch",
        desc=name,
        disable=jax.process_index() > 0,
    )
    keep = count if reference.kept is not None else 0
    summary = summarise(features, batches, name, total=count, keep=keep, labels=labels)
    return compare(features, summary, reference)


def table(cells: Sequence[Cell], settings: dict[str, Any]) -> str:
    """The cells as a Markdown table, the smallest distance in bold."""
    names = list(cells[0]["metrics"])
    best = min(cells, key=lambda cell: cell["metrics"][names[0]])
    lines = [
        f"{settings['num_samples']:,} samples a cell, the same noise and labels in "
        f"each; seed {settings['seed']}, {settings['method']}, {settings['steps']} "
        f"steps, {settings['labels']} labels, {settings['weights']} weights of step "
        f"{settings['step']:,}; {settings['features']}.",
        "",
        f"| guidance | interval | {' | '.join(SHOWN[name] for name in names)} |",
        "|" + "---|" * (2 + len(names)),
    ]
    for cell in sorted(cells, key=lambda c: [c[name] for name in NAMES]):
        values = [f"{cell['metrics'][name]:.4g}" for name in names]
        if cell is best:
            values[0] = f"**{values[0]}**"
        interval = (
            "none"
            if cell["guidance"] == 1
            else "{:g} to {:g}".format(*(cell[name] for name in NAMES[1:]))
        )
        row = [f"{cell['guidance']:g}", interval, *values]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def write(
    out: epath.Path,
    cells: Sequence[Cell],
    settings: dict[str, Any],
    scales: Sequence[float],
    intervals: Sequence[Interval],
) -> None:
    """sweep.json, sweep.md and sweep.png of the finished cells."""
    text = json.dumps({"settings": settings, "cells": cells}, indent=2) + "\n"
    fresh = out / f"{FILE}.tmp"
    fresh.write_text(text)
    fresh.replace(out / FILE)
    (out / "sweep.md").write_text(table(cells, settings))
    metric = next(iter(cells[0]["metrics"]))
    values = np.full((len(intervals), len(scales)), np.nan)
    for i, (low, high) in enumerate(intervals):
        for j, scale in enumerate(scales):
            (wanted,) = cells_of([scale], [(low, high)])
            if done := find(cells, wanted):
                values[i, j] = done["metrics"][metric]
    name = f"{SHOWN[metric]}, {settings['num_samples']:,} samples"
    with plots.style():
        figure = plots.heat_map(values, scales, intervals, name)
        with (out / "sweep.png").open("wb") as file:
            figure.savefig(file, dpi=150)


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--reference",
        required=True,
        metavar="REF",
        help="as of sra2_jax.programs.evaluate",
    )
    add("--out", required=True, metavar="FOLDER", help="for table, picture and JSON")
    add("--guidance", default="1,1.4,1.8,2.2", help="scales (%(default)s)")
    add("--interval", default="0:1,0:0.7", help="low:high, t = 0 is data (%(default)s)")
    add("--num", type=int, default=5000, help="samples a cell (%(default)s)")
    add_feature_arguments(parser)
    return parser.parse_known_args()


def main() -> None:
    a, overrides = parse()
    scales, intervals = parse_scales(a.guidance), parse_intervals(a.interval)
    if a.num < 2:
        raise UserError(f"--num={a.num}: must be at least 2")
    config = read_settings(a.workdir, overrides)
    for cell in cells_of(scales, intervals):  # fails before anything is loaded
        changed = config.copy_and_resolve_references()
        changed.sampling.update(cell)
        configuration.check(changed)
    distributed.initialize(a)
    held = open_reference(a.reference, a.resolution, a.split)
    subject = open_subject(config, a.workdir, a.weights, a.step)
    batch = batch_size(config, subject.mesh)
    features = make_features(a.features, a.inception, subject.mesh, batch)
    settings = {k: v for k, v in subject.settings.items() if k not in NAMES}
    settings |= {"num_samples": a.num, "reference": a.reference, **features.facts}
    out = epath.Path(a.out)
    cells = read_finished(out / FILE, settings)
    out.mkdir(parents=True, exist_ok=True)
    reference = summarise_reference(features, held, batch, manifold=True)
    for cell in cells_of(scales, intervals):
        if not find(cells, cell):
            metrics = run_cell(subject, features, reference, cell, a.num)
            cells.append({**cell, "metrics": metrics})
        if jax.process_index() == 0:
            write(out, cells, settings, scales, intervals)
    if jax.process_index() == 0:
        print(table(cells, settings))
        print(f"wrote {out / 'sweep.md'}, sweep.png, {FILE}")
    distributed.finish()


if __name__ == "__main__":
    run_program(main)
