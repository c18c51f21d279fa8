"""One self-contained page about a run: python -m sra2_jax.evaluation.report WORKDIR.

Reads what training wrote into the workdir (config.json, versions.json, run.json,
metrics.jsonl, images/, samples/, results.json) and writes report.html: pictures inline
as PNG, curves as SVG, nothing fetched. Whatever a young run lacks, the page names in
its place. Needs neither jax nor TensorFlow, so it opens runs copied from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sra2_jax.errors import UserError, run_program
from sra2_jax.evaluation.curves import Series, curve, short

HERE = Path(__file__).parent
PICTURE_SIDE = 1280  # pixels; larger grids are reduced, or the page would be huge
STRIP_SIDE, STRIP_COUNT = 768, 24  # the same for the strip, and its number of grids
WARMUP = 0.1  # share of the log left out of the median speed

# key in metrics.jsonl -> title, whether the axis starts at 0, whether it is smoothed
CURVES = {
    "loss_denoise": ("Denoising loss", False, True),
    "loss_align_vae": ("Alignment loss", False, True),
    "ratio_align_vae": ("Alignment / denoising", False, True),
    "grad_norm": ("Gradient norm", False, True),
    "learning_rate": ("Learning rate", True, False),
    "images_per_second": ("Images per second", True, True),
}
QUALITY = {
    "frechet": ("Fréchet distance, proxy", "lower is better"),
    "accuracy": ("Share recognised as asked", "higher is better"),
}
REFERENCES = {
    "train": "Real images<small>of the training set</small>",
    "reconstruction": "Reconstructions<small>real images through the VAE</small>",
}
HOW = ("num_samples", "weights", "sampler", "steps", "guidance", "seed")
HONEST = (
    "A proxy: not FID, and not to be compared with any published FID. Real images, "
    "measured the same way, give the level that good samples would reach."
)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def shown(key: str, value: float | None) -> str:
    """A metric's value as text."""
    return percent(value) if key.endswith("accuracy") else short(value)


def text(value: Any) -> str:
    """A value of a config or result, escaped."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return escape(value if isinstance(value, str) else json.dumps(value)) or "empty"


def missing(what: str) -> str:
    return f'<p class="missing">{escape(what)}</p>'


def section(title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def pairs(values: Mapping[str, Any]) -> str:
    rows = (
        f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items()
    )
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def title(run: Run) -> str:
    """The head of the page: name, what was trained, when, and how far it is."""
    config, model = run.config, lookup(run.config, "model")
    steps, align = number(config, "steps"), lookup(config, "align", "vae")
    claim = (
        f"A SiT of {text(lookup(model, 'depth'))} blocks and width "
        f"{text(lookup(model, 'width'))}, trained on VAE latents"
    )
    if lookup(align, "enabled"):
        claim += f"; block {text(lookup(align, 'depth'))} aligned with the same latents"
    data = lookup(config, "data", "images") or lookup(config, "data", "dir")
    source = run.workdir / "versions.json"
    if not source.exists():
        source = run.workdir / "config.json"
    written = datetime.datetime.fromtimestamp(source.stat().st_mtime)
    network = number(run.run, "parameters", "network")
    facts = [
        f"{short(network)} parameters" if network else "",
        f"{short(steps)} steps of {text(lookup(config, 'batch_size'))} images",
        f"{text(str(data).rstrip('/').rpartition('/')[2])}" if data else "",
        f"{text(lookup(config, 'data', 'resolution'))} px",
        text(lookup(run.versions, "device")) if run.versions else "",
        text(lookup(run.versions, "date") or f"{written.day} {written:%B %Y}"),
    ]
    line = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    progress = ""
    if steps and run.step < steps:
        progress = (
            f'<div class="progress"><progress value="{run.step}" max="{steps:.0f}">'
            f"</progress>Not finished: step {run.step:,} of {steps:,.0f}</div>"
        )
    return (
        f'<header><p class="kind">SRA 2 training run</p><h1>{name(run)}</h1>'
        f'<p class="claim">{claim}.</p><p class="facts">{line}</p>{progress}</header>'
    )


def name(run: Run) -> str:
    return text(lookup(run.config, "name") or run.workdir.resolve().name)


def quality(run: Run, key: str) -> tuple[float | None, str]:
    """The newest value of a metric, from results.json or the log, and where from."""
    value = number(run.results, "metrics", key)
    if value is not None:
        step = number(run.results, "step")
        return value, "" if step is None else f"step {step:,.0f}"
    if f"eval/{key}" not in run.series:
        return None, "not evaluated yet"
    steps, values = run.series[f"eval/{key}"]
    return float(values[-1]), f"step {steps[-1]:,.0f}"


def tiles(run: Run) -> str:
    """The headline figures, each with what to hold it against."""
    cells = []
    for key, label, level in (
        ("accuracy", "Recognised as asked", "real images"),
        ("frechet", "Fréchet distance, proxy", "floor, real images:"),
    ):
        value, where = quality(run, key)
        real = number(run.results, "reference", f"train_{key}")
        notes = [where, f"{level} {shown(key, real)}" if real is not None else ""]
        cells.append((label, shown(key, value), "<br>".join(n for n in notes if n)))
    speed = run.series.get("images_per_second")
    median, compiled = None, number(run.run, "compile_seconds")
    if speed is not None:
        # the first rows hold the compilation; a log of one row has nothing else
        median = float(np.median(speed[1][math.ceil(WARMUP * (len(speed[1]) - 1)) :]))
    device, devices = (lookup(run.versions, k) for k in ("device", "device_count"))
    note = text(device) if device else ""
    if isinstance(devices, int) and devices > 1:
        note = f"{devices} × {note}"
    cells.append(
        ("Images per second", short(median), f"median after warm-up<br>{note}")
    )
    seconds = "–" if compiled is None else f"{short(compiled)}<small> s</small>"
    cells.append(("Compile time", seconds, "before the first step"))
    network, heads = (number(run.run, "parameters", k) for k in ("network", "heads"))
    extra = (
        f"+ {short(heads)} in the head, used in training only" if heads else "network"
    )
    cells.append(("Parameters", short(network), extra))
    body = "".join(
        f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
        f"<dd>{note}</dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="tiles">{body}</dl>'


def panel(run: Run, grids: Sequence[tuple[int, Path]]) -> str:
    """Real images, the same through the VAE, and the newest samples."""
    step, path = grids[-1] if grids else (0, run.workdir / "samples")
    figures = [
        (run.workdir / "images/real.png", "Real", "images held out from training"),
        (run.workdir / "images/reconstruction.png", "Reconstruction", "the same images "
         "through the VAE: the best that samples in its latent space can look"),
        (path, "Samples", f"step {step:,}, each row asked for the same class"),
    ]  # fmt: skip
    body = ""
    for file, label, what in figures:
        image = picture(file, f"{label}: {what}", PICTURE_SIDE)
        shape = image or missing(f"Not there yet: {file.relative_to(run.workdir)}")
        body += (
            f"<figure>{shape}<figcaption><b>{label}</b>, {escape(what)}</figcaption>"
            "</figure>"
        )
    return section("Real and generated", "", f'<div class="panel">{body}</div>')


def strip(run: Run, grids: Sequence[tuple[int, Path]]) -> str:
    """The sample grids in order; report.js adds a large one and a slider."""
    lead = "The same noise and the same classes at every saved step."
    if len(grids) > STRIP_COUNT:
        chosen = np.linspace(0, len(grids) - 1, STRIP_COUNT).round().astype(int)
        lead += f" {STRIP_COUNT} of {len(grids)} saved grids, evenly spaced."
        grids = [grids[i] for i in chosen]
    pictures = [(s, picture(path, f"Step {s:,}", STRIP_SIDE)) for s, path in grids]
    figures = [
        f"<figure>{image}<figcaption>{step:,}</figcaption></figure>"
        for step, image in pictures
        if image
    ]
    if not figures:
        body = missing("No samples yet: the first grid is written to samples/.")
    else:
        body = f'<div class="strip">{"".join(figures)}</div>'
    if len(figures) > 1:
        body = (
            '<div class="stage" hidden><img alt=""><div><p></p><label>'
            f'<input type="range" min="0" max="{len(figures) - 1}" value="0">'
            f"Training step</label></div></div>{body}"
        )
    return section("Samples over training", lead, body)


def curves(run: Run) -> str:
    """Quality, where the run measures it, then what the optimizer saw."""
    figures = []
    for key, (label, _) in QUALITY.items():
        if f"eval/{key}" not in run.series and not lookup(run.config, "eval", "proxy"):
            continue
        level = number(run.results, "reference", f"train_{key}")
        show = functools.partial(shown, key)
        series = run.series.get(f"eval/{key}")
        figures.append(curve(label, series, run.step, show, zero=True, level=level))
    figures += ['<div class="note"></div>'] if figures else []
    aligned = lookup(run.config, "align", "vae", "enabled")
    for key, (label, zero, smoothed) in CURVES.items():
        series = run.series.get(key)
        if series is None and not aligned and "align" in key:
            continue
        figures.append(
            curve(label, series, run.step, short, zero=zero, smoothed=smoothed)
        )
    key = (
        '<p class="lead">Against step. <span class="key thin">as logged</span> '
        '<span class="key">running mean over a twentieth of the log</span> '
        '<span class="key dashed">level of real training images</span></p>'
    )
    return section("Curves", "", f'{key}<div class="charts">{"".join(figures)}</div>')


def results(run: Run) -> str:
    """The table of results.json, and what its numbers are and are not."""
    metrics = lookup(run.results, "metrics")
    if not isinstance(metrics, dict) or not metrics:
        return section("Results", "", missing("No evaluation yet: no results.json."))
    rows = ""
    for key in metrics:
        label, direction = QUALITY.get(key, (str(key), ""))
        values = [number(metrics, key)]
        values += [number(run.results, "reference", f"{k}_{key}") for k in REFERENCES]
        cells = "".join(f"<td>{shown(key, v)}</td>" for v in values)
        rows += f"<tr><th>{escape(label)}<small>{direction}</small></th>{cells}</tr>"
    heads = "".join(f"<th>{what}</th>" for what in REFERENCES.values())
    samples = f"Samples<small>step {text(lookup(run.results, 'step'))}</small>"
    table = (
        '<div class="scroll"><table class="numbers"><thead><tr><th></th>'
        f"<th>{samples}</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    how = {k: run.results[k] for k in HOW if k in run.results}
    space, note = (lookup(run.results, k) for k in ("space", "note"))
    words = [f"Measured in: {space}" if space else "", note, HONEST]
    notes = "".join(f"<p>{escape(str(w))}</p>" for w in words if w)
    return section(
        "Results", "", f'{table}<div class="after note">{notes}</div>{pairs(how)}'
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested section with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        out |= {f"{prefix}{key}": value} if inner is None else inner
    return out


def configuration(run: Run) -> str:
    """Every key of the resolved config, a section to fold out each."""
    sections: dict[str, dict[str, Any]] = {"run as a whole": {}}
    for key, value in run.config.items():
        if isinstance(value, dict):
            sections[key] = flat(value)
        else:
            sections["run as a whole"][key] = value
    body = "".join(
        f"<details><summary>{text(label)}<span>{len(values)}</span></summary>"
        f"{pairs(values)}</details>"
        for label, values in sections.items()
        if values
    )
    return section("Configuration", "Every key, as resolved when the run began.", body)


def versions(run: Run) -> str:
    facts = flat(run.versions)
    body = pairs(facts) if facts else missing("No versions.json.")
    return section("Versions", "", body)


def reproduce(run: Run) -> str:
    """The command, from run.json where training noted it, else from the config."""
    command, commit = lookup(run.run, "command"), lookup(run.versions, "commit")
    lead = "The command that started this run."
    if not isinstance(command, str):
        words = ["python", "main.py", f"--config=configs/{run.config.get('name')}.py"]
        for key in ("seed", "steps", "batch_size"):
            if key in run.config:
                words.append(f"--config.{key}={run.config[key]}")
        command = " ".join(shlex.quote(word) for word in words)
        lead = (
            "From the config's name, seed, steps and batch size; keys changed on the "
            "command line beyond these are in the configuration above."
        )
    lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    code = escape("\n".join([*lines, command]))
    return section("Reproduce", lead, f"<pre><code>{code}</code></pre>")


def page(run: Run) -> str:
    """The whole document."""
    grids = sample_grids(run)
    parts = [
        tiles(run), panel(run, grids), strip(run, grids), curves(run), results(run),
        configuration(run), versions(run), reproduce(run),
    ]  # fmt: skip
    style, script = ((HERE / f"report.{kind}").read_text() for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name(run)}, SRA 2 training run</title>\n<style>\n{style}</style>"
        f"</head>\n<body><main>{title(run)}\n{chr(10).join(parts)}</main>\n"
        "<footer>Written by sra2_jax.evaluation.report.</footer>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Write WORKDIR/report.html and return its path. UserError where there is no run."""
    folder = Path(workdir)
    content = page(read_run(folder))
    target, fresh = folder / "report.html", folder / "report.html.tmp"
    fresh.write_text(content, encoding="utf-8")
    fresh.replace(target)  # a reader never sees half a page
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", help="folder of a training run")
    print(f"wrote {write_report(parser.parse_args().workdir)}")


if __name__ == "__main__":
    run_program(main)
