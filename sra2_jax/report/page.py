"""One self-contained page about a run: python -m sra2_jax report WORKDIR.

Reads what training wrote into the workdir (config.json, versions.json, run.json,
metrics.jsonl, images/, samples/, results.json) and writes report.html: pictures inline
as PNG, curves as SVG, nothing fetched. Whatever a young run lacks, the page names in
its place. Needs neither jax nor TensorFlow, so it opens runs copied from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from etils import epath

from sra2_jax.command import run_program
from sra2_jax.report.curves import curve, short
from sra2_jax.report.html import missing, pairs, section, text
from sra2_jax.report.quality import quality_curves, quality_tiles, results
from sra2_jax.report.rundir import (
    METHODS,
    Run,
    flat,
    lookup,
    number,
    picture,
    read_run,
    sample_grids,
)

HERE = Path(__file__).parent
PICTURE_SIDE = 1280  # pixels; larger grids are reduced, or the page would be huge
STRIP_SIDE, STRIP_COUNT = 768, 24  # the same for the strip, and its number of grids

# key in metrics.jsonl -> title, whether the axis starts at 0, whether it is smoothed
CURVES = {
    "loss_denoise": ("Denoising loss", False, True),
    **{f"loss_align_{n}": (f"Alignment loss, {n}", False, True) for n in METHODS},
    **{f"ratio_align_{n}": (f"Aligned / denoising, {n}", False, True) for n in METHODS},
    "grad_norm": ("Gradient norm", False, True),
    "learning_rate": ("Learning rate", True, False),
    "images_per_second": ("Images per second", True, True),
}


def header(run: Run) -> str:
    """Name, what was trained on what, when, and how far it is."""
    config, steps = run.config, number(run.config, "steps")
    data = lookup(config, "data")
    size = (text(lookup(config, "model", key)) for key in ("depth", "width"))
    claim = "A SiT of {} blocks and width {}, trained on VAE latents".format(*size)
    for name in run.aligned:
        depth = text(lookup(config, "align", name, "depth"))
        claim += f", block {depth} aligned with {escape(METHODS[name][1])}"
    source = str(lookup(data, "images") or lookup(data, "dir") or "").rstrip("/")
    network = number(run.run, "parameters", "network")
    facts = [
        f"{short(network)} parameters" if network else "",
        f"{short(steps)} steps of {text(lookup(config, 'batch_size'))} images",
        escape(source.rpartition("/")[2]),  # not the author's home
        f"{text(lookup(data, 'resolution'))} px",
        text(run.date),
    ]
    line = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    progress = ""
    if steps and run.step < steps:
        progress = (
            f'<div class="progress"><progress value="{run.step}" max="{steps:.0f}">'
            f"</progress>Not finished: step {run.step:,} of {steps:,.0f}</div>"
        )
    return (
        f'<header><p class="kind">{run.method} run</p><h1>{text(run.name)}</h1>'
        f'<p class="claim">{claim}.</p><p class="facts">{line}</p>{progress}</header>'
    )


def loss_tiles(run: Run) -> list[tuple[str, str, str]]:
    """What a run that measures no quality shows first."""
    cells = []
    for key in ("loss_denoise", "grad_norm"):
        steps, values = run.series.get(key, (None, None))
        if values is None or steps is None:
            cells.append((CURVES[key][0], short(None), "not logged yet"))
            continue
        tail = values[-max(1, len(values) // 20) :]
        note = f"mean of the last {len(tail)} rows<br>step {steps[-1]:,.0f}"
        cells.append((CURVES[key][0], short(float(tail.mean())), note))
    return cells


def tiles(run: Run) -> str:
    """The headline figures, each with what to hold it against."""
    cells = quality_tiles(run) or loss_tiles(run)
    device = lookup(run.versions, "device")
    count = number(run.versions, "device_count") or 1
    note = f"{count:.0f} x {text(device)}" if count > 1 else text(device)
    note = f"median after warm-up<br>{note if device else ''}"
    cells.append(("Images per second", short(run.speed), note))
    seconds = number(run.run, "compile_seconds")
    compiled = (
        short(seconds) if seconds is None else f"{short(seconds)}<small> s</small>"
    )
    cells.append(("Compile time", compiled, "before the first step"))
    network, heads = (number(run.run, "parameters", k) for k in ("network", "heads"))
    extra = f"+ {short(heads)} in the head,<br>training only" if heads else "network"
    cells.append(("Parameters", short(network), extra))
    body = "".join(
        f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
        f"<dd>{note}</dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="tiles">{body}</dl>'


def panel(run: Run, grids: Sequence[tuple[int, epath.Path]]) -> str:
    """Real images, the same through the VAE, and the newest samples."""
    real, decoded = (
        run.workdir / "images" / f"{kind}.png" for kind in ("real", "reconstruction")
    )
    step, newest_grid = grids[-1] if grids else (0, run.workdir / "samples")
    figures = [
        (real, "Real", "images held out from training"),
        (decoded, "Reconstruction", "the same images through the VAE"),
        (newest_grid, "Samples", f"step {step:,}, one class to a row"),
    ]
    if decoded.exists() and not real.exists():  # a run without pixels to compare with
        figures[:2] = [(decoded, "Reconstruction", "training latents, decoded")]
    body = ""
    for file, label, what in figures:
        image = picture(file, f"{label}: {what}", PICTURE_SIDE)
        place = "/".join(file.parts[len(run.workdir.parts) :])
        what = escape(what if image or label != "Samples" else "not saved yet")
        body += (
            f"<figure>{image or missing(f'Nothing to show in {place}.')}"
            f"<figcaption><b>{label}</b> {what}</figcaption></figure>"
        )
    return section("Real and generated", "", f'<div class="panel">{body}</div>')


def strip(grids: Sequence[tuple[int, epath.Path]]) -> str:
    """The sample grids in order; report.js adds a large one and a slider."""
    lead = "The same noise and the same classes at every saved step."
    if len(grids) > STRIP_COUNT:
        lead += f" {STRIP_COUNT} of the {len(grids)} saved grids, evenly spaced."
        chosen = np.linspace(0, len(grids) - 1, STRIP_COUNT).round().astype(int)
        grids = [grids[i] for i in chosen]
    pictures = [(s, picture(path, f"Step {s:,}", STRIP_SIDE)) for s, path in grids]
    frame = "<figure>{}<figcaption>{:,}</figcaption></figure>"
    figures = [frame.format(image, step) for step, image in pictures if image]
    if not figures:
        body = missing("No samples yet: training writes the first grid to samples/.")
        return section("Samples over training", "", body)
    stage = (
        '<img class="large" alt="" hidden><div class="control" hidden><p></p>'
        f'<input type="range" min="0" max="{len(figures) - 1}" value="0" '
        'aria-label="Training step"></div>'
    )
    body = f'{stage}<div class="strip">{"".join(figures)}</div>'
    return section("Samples over training", lead, f'<div class="film">{body}</div>')


def curves(run: Run) -> str:
    """Quality, where the run measures it, then what the optimizer saw."""
    optimizer = ""
    on = tuple(f"_align_{name}" for name in run.aligned)
    for key, (label, zero, smoothed) in CURVES.items():
        series = run.series.get(key)
        if series is not None or "align" not in key or key.endswith(on):
            optimizer += curve(label, series, run.step, short, zero, smoothed)
    lead = (
        "Against the training step. Thin: as logged; bold: smoothed over about a "
        "twentieth of the log. An axis is logarithmic where its range is wide."
    )
    return section(
        "Curves", lead, f'<div class="charts">{quality_curves(run)}{optimizer}</div>'
    )


def configuration(run: Run) -> str:
    """Every key of the resolved config, a section to fold out each."""
    whole = {k: v for k, v in run.config.items() if not isinstance(v, dict)}
    nested = {k: flat(v) for k, v in run.config.items() if isinstance(v, dict)}
    body = "".join(
        f"<details><summary>{text(label)}<span>{len(values)}</span></summary>"
        f"{pairs(values)}</details>"
        for label, values in ({"run as a whole": whole} | nested).items()
    )
    return section("Configuration", "Every key, as resolved when the run began.", body)


def reproduce(run: Run) -> str:
    """Versions, and a command made from the config and the commit."""
    config = run.config
    facts = flat(run.versions)
    table = pairs(facts) if facts else missing("No versions.json in this run.")
    words = ["python", "main.py", f"--config=configs/{lookup(config, 'name')}.py"]
    for key in ("seed", "steps", "batch_size"):
        if key in config:
            words.append(f"--config.{key}={config[key]}")
    lines = [" ".join(shlex.quote(word) for word in words)]
    commit = lookup(run.versions, "commit")
    if commit and commit != "unknown":
        lines.insert(0, f"git checkout {shlex.quote(str(commit))}")
    code = escape("\n".join(lines))
    lead = (
        "From the config's name, seed, steps and batch size; any other key changed on "
        "the command line is in the configuration above."
    )
    return section("Versions", "", table) + section(
        "Reproduce", lead, f"<pre><code>{code}</code></pre>"
    )


def page(run: Run) -> str:
    """The whole document."""
    grids = sample_grids(run)
    parts = [header(run), tiles(run), panel(run, grids), strip(grids), curves(run)]
    parts += [results(run), configuration(run), reproduce(run)]
    style, script = (
        (HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(run.name)}, SRA 2 training run</title>\n<style>\n{style}</style>"
        f"</head>\n<body><main>{body}</main>\n"
        "<footer>Written by sra2_jax.report.page.</footer>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def write_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Write WORKDIR/report.html and return its path.

    Raises:
      UserError: WORKDIR is missing or holds no readable config.json.
    """
    folder = epath.Path(workdir)
    content = page(read_run(folder))
    target, fresh = folder / "report.html", folder / "report.html.tmp"
    fresh.write_text(content, encoding="utf-8")
    fresh.replace(target)  # a reader never sees half a page
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdir", help="folder of a training run")
    print(f"wrote {write_report(parser.parse_args().workdir)}")


if __name__ == "__main__":
    run_program(main)
