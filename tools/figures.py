"""Figures of runs of main.py: python -m tools.figures KIND RUN [RUN ...] --out=FILE.

pca: principal components of the tokens of some blocks as colours, image by image.
probe: how much of the clean latent a linear map reads off each block.
curves: a metric of the log against the steps or the seconds of training.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from sra2_jax.command import run_program
from sra2_jax.config import flatten
from sra2_jax.errors import UserError
from sra2_jax.report.curves import MARKED, smooth
from sra2_jax.report.page import CURVES
from sra2_jax.report.quality import QUALITY
from sra2_jax.report.rundir import Run, number, read_run
from tools import plots, probes

FORMATS = (".png", ".pdf", ".svg")
RECORDS = 512  # that `probe` reads where nothing is said
POOL = 16  # records for each shown image, to choose different classes from
# Keys of a config in which runs of one label may differ,
FREE = (
    "name", "seed", "steps", "data.dir", "data.images", "data.streams", "run.", "mesh.",
    "eval.every", "model.scan", "model.remat", "model.attention", "sampling.batch_size",
)  # fmt: skip
# and those in which the curves of one plot may not.
SHARED = ("vae", "data.resolution", "data.num_classes", "latents.", "eval.features")
REFERENCES = {
    "real": "real images",
    "reconstruction": "real images through the VAE",
}
EPILOG = """
A RUN is the workdir of a run of main.py, finished or not; it is called by its config's
name, or LABEL in LABEL=RUN. Runs of one label are seeds of one experiment: they share a
colour, and a thick line is their mean. An existing FILE is overwritten.
"""


def split_labels(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(label, workdir) of each RUN or LABEL=RUN; no label is ""."""
    pairs = []
    for argument in arguments:
        label, equals, workdir = argument.partition("=")
        if not equals or epath.Path(argument).exists():
            label, workdir = "", argument
        pairs.append((label, workdir.rstrip("/")))
    return pairs


def numbers(flag: str, text: Any, kind: type = int) -> list[Any]:
    """The values of a comma-separated flag, without repetitions."""
    try:
        return list(dict.fromkeys(kind(part) for part in str(text).split(",")))
    except ValueError as error:
        example = "2,4,8" if kind is int else "0.2,0.5,0.8"
        raise UserError(f"--{flag}={text}: give numbers, as in {example}") from error


def check_range(flag: str, values: Sequence[float], low: int, high: int) -> None:
    for value in values:
        if not low <= value <= high:  # also refuses NaN
            raise UserError(f"--{flag}: {value} is not between {low} and {high}")


def check_out(text: str) -> Path:
    """The picture to write, its folder made.

    Raises:
      UserError: an unknown format, or no file can be written there.
    """
    path = Path(text)
    if path.suffix not in FORMATS:
        raise UserError(f"--out={text}: must end in one of {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_suffix(".json")):
            existed = file.exists()
            file.open("ab").close()
            if not existed:
                file.unlink()
    except OSError as error:
        raise UserError(
            f"--out={text}: cannot be written ({error.strerror or error}): name a file "
            "in another folder"
        ) from error
    return path


def check_labels(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """Refuse (label, workdir, flat config)s of one label that are not its seeds.

    Raises:
      UserError: two of a label have the same seed or differ in another key.
    """
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    seeds: dict[tuple[str, Any], str] = {}
    for label, workdir, config in runs:
        other, config_there = first.setdefault(label, (workdir, config))
        apart = "runs of one label are its seeds: give LABEL=RUN to tell them apart"
        for key in sorted(config.keys() | config_there.keys()):
            there, here = config_there.get(key), config.get(key)
            if there != here and not key.startswith(FREE):
                raise UserError(
                    f"{other} and {workdir} are both called {label!r}, but differ in "
                    f"config.{key}: {there!r} and {here!r}; {apart}"
                )
        seed = label, config.get("seed")
        if seed in seeds:
            raise UserError(
                f"{seeds[seed]} and {workdir} are both called {label!r} and have the "
                f"same config.seed={seed[1]}; {apart}"
            )
        seeds[seed] = workdir


def save(figure: Any, out: Path) -> None:
    figure.savefig(out, dpi=200)
    print(f"wrote {out}")


def names(runs: Sequence[probes.Subject]) -> list[str]:
    """Each run's label, with its folder where that alone does not tell them apart."""
    labels = [run.label for run in runs]
    return [
        f"{run.label} ({epath.Path(run.workdir).name})"
        if labels.count(run.label) > 1
        else run.label
        for run in runs
    ]


def pca(arguments: argparse.Namespace) -> None:
    """The paper's Figure 2: images, their latents and what blocks make of them."""
    count, times = arguments.images, numbers("times", arguments.times, float)
    check_range("images", [count], 1, 64)
    check_range("times", times, 0, 1)
    runs = probes.open_runs(split_labels(arguments.runs))
    blocks = probes.default_blocks(runs)
    if arguments.blocks:
        blocks = sorted(numbers("blocks", arguments.blocks))
        for run in runs:
            check_range(f"blocks, {run.workdir}", blocks, 1, run.config.model.depth)
    out = check_out(arguments.out)
    pool = probes.read_images(runs, arguments.data, count, POOL * count)
    images = pool.choose(count)
    pictures = images.decode(runs[0].config.vae)
    rows = []
    for run, name in zip(runs, names(runs), strict=True):
        step, forward = probes.open_blocks(run, blocks, not arguments.no_label)
        parts = [list(forward(images, t)) for t in times]
        found: dict[tuple[int, float], np.ndarray] = {}
        for k in blocks:
            panels = [np.concatenate([x[k] for x in part]) for part in parts]
            colors = probes.principal_colors(panels)
            found |= {(k, t): c for t, c in zip(times, colors, strict=True)}
        [latent] = probes.principal_colors([images.patches(run)])
        title = f"{name}, step {step:,}"
        rows.append(plots.TokenRow(title, pictures, latent, found, run.aligned))
    with plots.style():
        save(plots.tokens_figure(rows), out)


def probe(arguments: argparse.Namespace) -> None:
    """R^2 of each block's tokens for the clean latent, as a picture and as JSON."""
    times = numbers("times", arguments.times, float)
    check_range("times", times, 0, 1)
    runs = probes.open_runs(split_labels(arguments.runs))
    check_labels([(r.label, r.workdir, dict(flatten(r.config))) for r in runs])
    out = check_out(arguments.out)
    given = arguments.records is not None
    most = arguments.records if given else RECORDS
    check_range("records", [most], 1, 2**31)
    images = probes.read_images(runs, arguments.data, most if given else 1, most)
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
        facts.append(
            {
                "label": run.label,
                "workdir": run.workdir,
                "step": step,
                "aligned": run.aligned,
                "r2": table.tolist(),
            }
        )
    labels = "without" if arguments.no_label else "with"
    note = (
        "Ridge regression, block tokens to latent patches; "
        f"{len(images)} images of the {images.split} split, {labels} labels, "
        f"every {probes.HELD_OUT}th held out"
    )
    with plots.style():
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
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


def training_seconds(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps from 0 on, and seconds of training until each.

    Of the logged images a second, each the mean over the steps since the row before.
    Compilation, evaluation and sampling are not in them.

    Raises:
      UserError: they were not logged.
    """
    batch_size = number(run.config, "batch_size")
    if "images_per_second" not in run.series or not batch_size:
        raise UserError(f"{run.workdir}: has no images_per_second: use --against=step")
    steps, speeds = run.series["images_per_second"]
    seconds = np.cumsum(np.diff(steps, prepend=0) * batch_size / speeds)
    return np.append(0.0, steps), np.append(0.0, seconds)


def read_curve(run: Run, label: str, metric: str, against: str) -> plots.Line:
    """A metric's series; smoothed where it has many points.

    Raises:
      UserError: it was not logged.
    """
    if metric not in run.series:
        found = ", ".join(sorted(run.series)) or "nothing yet"
        raise UserError(f"{run.workdir}: no metric {metric!r}; logged: {found}")
    steps, values = run.series[metric]
    x = np.interp(steps, *training_seconds(run)) if against == "seconds" else steps
    return plots.Line(label, steps, x, smooth(values) if len(x) > MARKED else values)


def curves(arguments: argparse.Namespace) -> None:
    """A metric of several runs in one plot."""
    metric = arguments.metric
    key = metric.removeprefix("eval/")
    pairs = split_labels(arguments.runs)
    runs = [read_run(epath.Path(workdir)) for _, workdir in pairs]
    labels = [label or run.name for (label, _), run in zip(pairs, runs, strict=True)]
    configs = [dict(flatten(run.config)) for run in runs]
    workdirs = [workdir for _, workdir in pairs]
    check_labels(list(zip(labels, workdirs, configs, strict=True)))
    same = SHARED if key == metric else (*SHARED, "eval.num_samples")
    for workdir, config in zip(workdirs, configs, strict=True):
        for name, value in configs[0].items():
            if name.startswith(same) and config.get(name) != value:
                raise UserError(
                    f"{workdirs[0]} and {workdir} do not compare: config.{name} is "
                    f"{value!r} and {config.get(name)!r}"
                )
    lines = [
        read_curve(run, label, metric, arguments.against)
        for run, label in zip(runs, labels, strict=True)
    ]
    for label, group in plots.by_label(lines).items():
        if not len(plots.mean_line(group).steps):
            raise UserError(
                f"the runs called {label!r} have {metric} at no step in common: give "
                "LABEL=RUN to tell them apart"
            )
    out = check_out(arguments.out)
    levels = {}
    for kind, name in REFERENCES.items():
        found = [number(run.results, "reference", f"{kind}_{key}") for run in runs]
        if known := [level for level in found if level is not None]:
            levels[name] = known[0]
    title = CURVES[metric][0] if metric in CURVES else metric
    if key in QUALITY:
        title = "{} ({})".format(*QUALITY[key])
    xlabel = "step"
    if arguments.against == "seconds":
        xlabel = "seconds of training steps (nothing else counted)"
    many = max(len(line.x) for line in lines) > MARKED
    with plots.style():
        ylabel = f"{title} (running mean)" if many else title
        marker = "" if many else "o"
        save(plots.curves_figure(lines, levels, xlabel, ylabel, marker), out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.figures",
        description="Figures of runs of main.py.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for function in (pca, probe, curves):
        text = (function.__doc__ or "").strip()
        kind = kinds.add_parser(
            function.__name__, help=text, description=text, epilog=EPILOG,
            allow_abbrev=False,
        )  # fmt: skip
        kind.set_defaults(function=function)
        kind.add_argument(
            "runs", nargs="+", metavar="RUN", help="workdir, or LABEL=workdir"
        )
        kind.add_argument(
            "--out", required=True, metavar="FILE", help="picture to write"
        )
    flags = kinds.choices
    for name in ("pca", "probe"):
        add = flags[name].add_argument
        add("--times", default="0.2,0.5,0.8", help="noise levels, 0 to 1 (%(default)s)")
        add("--data", default="", help="latents dataset (default: the runs' own)")
        add("--no_label", action="store_true", help="do not tell the network the class")
    add = flags["pca"].add_argument
    add("--images", type=int, default=6, help="images to show (%(default)s)")
    add(
        "--blocks",
        default="",
        help="as in 2,4,8 (default: three, the aligned among them)",
    )
    add = flags["probe"].add_argument
    add("--records", type=int, help=f"images to read (default: up to {RECORDS})")
    add = flags["curves"].add_argument
    add("--metric", default="eval/frechet", help="of metrics.jsonl (%(default)s)")
    add("--against", default="step", choices=("step", "seconds"), help="(%(default)s)")
    arguments = parser.parse_args()
    # Accelerators round float32 products to bf16 or TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        arguments.function(arguments)


if __name__ == "__main__":
    run_program(main)
