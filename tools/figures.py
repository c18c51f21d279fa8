"""Figures of runs: python -m tools.figures KIND RUN [RUN ...] --out=FILE.

A RUN is a run's workdir, finished or not; it is called by its config's name, or LABEL
in LABEL=RUN. Runs of one label are seeds of one experiment: they share a colour, and a
thick line is their mean. An existing FILE is overwritten.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sra2_jax.command import Parser, run_program, writable
from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS
from sra2_jax.report.curves import MARKED, Series, read_series, smooth
from sra2_jax.report.page import titles
from sra2_jax.run import number
from sra2_jax.storage import write_json
from tools import plots, probes

RECORDS = 512  # that `probe` reads where nothing is said
POOL = 16  # records for each shown image, to choose different classes from
REFERENCES = {
    "real": "real images",
    "reconstruction": "real images through the VAE",
}


def numbers(kind: type, low: float, high: float) -> Callable[[str], list[Any]]:
    """argparse's type of comma-separated numbers; repetitions count once."""

    def parse(text: str) -> list[Any]:
        try:
            values = list(dict.fromkeys(map(kind, text.split(","))))
        except ValueError:
            values = []
        if not values or not all(low <= value <= high for value in values):  # or NaN
            what = f"{text}: give numbers between {low} and {high}, with commas"
            raise argparse.ArgumentTypeError(what)
        return values

    return parse


def open_runs(arguments: Sequence[str]) -> list[probes.Subject]:
    """Those of RUN or LABEL=RUN. Raises UserError where no run is."""
    runs = []
    for argument in arguments:
        label, equals, workdir = argument.partition("=")
        if not equals or epath.Path(argument).exists():
            label, workdir = "", argument
        runs.append(probes.Subject(workdir.rstrip("/"), label))
    return runs


def save(figure: Any, out: Path) -> None:
    figure.savefig(out, dpi=200)
    print(f"wrote {out}")


def pca(arguments: argparse.Namespace) -> None:
    """principal components of the tokens of some blocks as colours, image by image"""
    count, times = arguments.images, arguments.times
    runs = open_runs(arguments.runs)
    depth = min(run.config.model.depth for run in runs)
    aligned = {k for run in runs for k in run.aligned if k <= depth}
    blocks = sorted(arguments.blocks or probes.default_blocks(depth, aligned))
    if blocks[-1] > depth:
        raise UserError(f"--blocks={blocks[-1]}: the shallowest run has {depth} blocks")
    pool = probes.read_images(runs, arguments.data, count, POOL * count)
    images = pool.choose(count)
    pictures = images.decode(runs[0].config.vae)
    rows = []
    for run in runs:
        step, forward = run.open_blocks(blocks, not arguments.no_label)
        parts = [list(forward(images, t)) for t in times]
        found: dict[tuple[int, float], np.ndarray] = {}
        for k in blocks:
            panels = [np.concatenate([x[k] for x in part]) for part in parts]
            colors = probes.principal_colors(panels)
            found |= {(k, t): c for t, c in zip(times, colors, strict=True)}
        [latent] = probes.principal_colors([images.patches(run)])
        title = f"{run.label}, step {step:,}"
        rows.append(plots.TokenRow(title, pictures, latent, found, run.aligned))
    save(plots.tokens_figure(rows), arguments.out)


def probe(arguments: argparse.Namespace) -> None:
    """how much of the clean latent a linear map reads off each block; also as JSON"""
    times, out = arguments.times, arguments.out
    runs = open_runs(arguments.runs)
    least, most = arguments.records or 1, arguments.records or RECORDS
    images = probes.read_images(runs, arguments.data, least, most)
    panels: dict[float, list[plots.Line]] = {t: [] for t in times}
    facts = []
    for run in runs:
        step, table = probes.predictability(run, images, times, not arguments.no_label)
        blocks = np.arange(table.shape[1])
        for t, row in zip(times, table, strict=True):
            line = plots.Line(run.label, blocks, blocks, row, run.aligned)
            panels[t].append(line)
            shown = " ".join(f"{value:.3f}" for value in row)
            print(f"{run.label}, step {step}, t = {t:g}: x_t {shown}", flush=True)
        fact = {"label": run.label, "workdir": str(run.run), "step": step}
        facts.append(fact | {"aligned": run.aligned, "r2": table.tolist()})
    labels = "without" if arguments.no_label else "with"
    note = (
        "Ridge regression, block tokens to latent patches; "
        f"{len(images)} images of the {images.split} split, {labels} labels, "
        f"every {probes.HELD_OUT}th held out"
    )
    save(plots.probe_figure(panels, note), out)
    result = {
        "what": "r2[time][block]; block 0 is x_t itself",
        "times": times,
        "records": len(images),
        "split": images.split,
        "labels": not arguments.no_label,
        "test_every": probes.HELD_OUT,
        "ridge": probes.PENALTY,
        "runs": facts,
    }
    write_json(out.with_suffix(".json"), result)


def training_seconds(series: dict[str, Series], batch_size: int) -> Series:
    """Steps from 0 on, and seconds of training until each.

    Of the logged images a second, each the mean over the steps since the row before.
    Compilation, evaluation and sampling are not in them.
    """
    steps, speeds = series["images_per_second"]
    seconds = np.cumsum(np.diff(steps, prepend=0) * batch_size / speeds)
    return np.append(0.0, steps), np.append(0.0, seconds)


def read_curve(run: probes.Subject, metric: str, against: str) -> plots.Line:
    """A metric's series; smoothed where it has many points.

    Raises:
      UserError: it, or the speed, was not logged.
    """
    series = read_series(run.run.rows())
    for key in (metric, *(["images_per_second"] if against == "seconds" else [])):
        if key not in series:
            found = ", ".join(sorted(series)) or "nothing yet"
            raise UserError(f"{run.run}: no metric {key!r}; logged: {found}")
    x, values = steps, _ = series[metric]
    if against == "seconds":
        x = np.interp(steps, *training_seconds(series, run.config.batch_size))
    return plots.Line(
        run.label, steps, x, smooth(values) if len(x) > MARKED else values
    )


def curves(arguments: argparse.Namespace) -> None:
    """a metric of the log against the steps or the seconds of training"""
    metric, against = arguments.metric, arguments.against
    key = metric.removeprefix("eval/")
    runs = open_runs(arguments.runs)
    lines = [read_curve(run, metric, against) for run in runs]
    levels = {}
    results = [run.run.read("results") for run in runs]
    for kind, name in REFERENCES.items():
        found = [number(result, "reference", f"{kind}_{key}") for result in results]
        if known := [level for level in found if level is not None]:
            levels[name] = known[0]
    title = titles(vars(runs[0].config.align)).get(metric, metric)
    if key in METRICS:
        title = "{} ({})".format(*METRICS[key])
    xlabel = "step"
    if against == "seconds":
        xlabel = "seconds of training steps (nothing else counted)"
    many = max(len(line.x) for line in lines) > MARKED
    ylabel = f"{title} (running mean)" if many else title
    marker = "" if many else "o"
    save(plots.curves_figure(lines, levels, xlabel, ylabel, marker), arguments.out)


def main() -> None:
    about, _, epilog = (__doc__ or "").partition("\n")
    parser = Parser(prog="python -m tools.figures", description=about, epilog=epilog)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for function in (pca, probe, curves):
        text = function.__doc__
        kind = kinds.add_parser(
            function.__name__, help=text, description=text, epilog=epilog
        )
        kind.set_defaults(function=function)
        add = kind.add_argument
        add("runs", nargs="+", metavar="RUN", help="workdir, or LABEL=workdir")
        add("--out", type=writable, required=True, metavar="FILE", help="to write")
        if function is curves:
            add("--metric", default="eval/frechet", help="logged (%(default)s)")
            add("--against", default="step", choices=("step", "seconds"))
            continue
        levels: Any = {"type": numbers(float, 0, 1), "default": "0.2,0.5,0.8"}
        add("--times", **levels, help="noise levels (%(default)s)")
        add("--data", default="", help="latents dataset (default: the runs' own)")
        add("--no_label", action="store_true", help="the network is not told the class")
        if function is pca:
            add("--images", type=int, default=6, help="images to show (%(default)s)")
            choose: Any = {"type": numbers(int, 1, 1000), "metavar": "2,4,8"}
            add("--blocks", **choose, help="(default: three, the aligned among them)")
        else:
            add(
                "--records", type=int, help=f"images to read (default: up to {RECORDS})"
            )
    arguments = parser.parse_args()
    # Accelerators round float32 products to bf16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"), plots.style():
        arguments.function(arguments)


if __name__ == "__main__":
    run_program(main)
