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

from sra2_jax.evaluation.curves import Series, curve, short
from sra2_jax.errors import UserError, run_program

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

@dataclasses.dataclass(frozen=True)
class Run:
    """What was found in a workdir; a file that is missing or broken is empty here."""

    workdir: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    run: dict[str, Any]
    results: dict[str, Any]
    series: dict[str, Series]

    @property
    def step(self) -> int:
        """The last step that anything was logged for."""
        return int(max((steps[-1] for steps, _ in self.series.values()), default=0))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if the file is missing or not (yet) an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: Path) -> dict[str, Series]:
    """Each metric's series. Of a step logged twice (a resumed run) the later wins."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the line being written, or one cut by a crash
            continue
        step = number(row, "step")
        for key in row if step is not None else ():
            value = number(row, key)
            if value is not None and key != "step":
                found.setdefault(key, {})[step] = value
    return {k: tuple(np.array(sorted(v.items())).T) for k, v in found.items()}


def read_run(workdir: Path) -> Run:
    """Everything but the pictures. UserError where there is no run."""
    if not workdir.is_dir():
        raise UserError(f"no run: {workdir} is not a folder; give a run's workdir")
    config = read_json(workdir / "config.json")
    if not config:
        raise UserError(
            f"no run: {workdir / 'config.json'} is missing or not readable; "
            "give the workdir of a run that has started"
        )
    versions, run, results = (
        read_json(workdir / f"{name}.json") for name in ("versions", "run", "results")
    )
    series = read_metrics(workdir / "metrics.jsonl")
    return Run(workdir, config, versions, run, results, series)


def lookup(value: Any, *keys: str) -> Any:
    """value[key][key]..., None where anything on the way is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any, *keys: str) -> float | None:
    """`lookup` for a finite number, None for anything else."""
    found = lookup(value, *keys)
    good = isinstance(found, int | float) and not isinstance(found, bool)
    return float(found) if good and math.isfinite(found) else None


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
    rows = (f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def picture(path: Path, alt: str, side: int) -> str | None:
    """An <img> with the file inside, at most `side` pixels wide; None if unreadable."""
    try:
        data = path.read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
        if max(image.size) > side or image.format != "PNG":
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", optimize=True)
            data = buffer.getvalue()
    except (OSError, SyntaxError, ValueError):  # Pillow's for a half-written PNG
        return None
    # small pictures are enlarged by the page: show their pixels, do not blur them
    look = ' class="pixels"' if image.width <= 400 else ""
    source = base64.b64encode(data).decode()
    return (
        f'<img{look} width="{image.width}" height="{image.height}" '
        f'alt="{escape(alt)}" src="data:image/png;base64,{source}">'
    )


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
    cells.append(("Images per second", short(median), f"median after warm-up<br>{note}"))
    seconds = "–" if compiled is None else f"{short(compiled)}<small> s</small>"
    cells.append(("Compile time", seconds, "before the first step"))
    network, heads = (number(run.run, "parameters", k) for k in ("network", "heads"))
    extra = f"+ {short(heads)} in the head, used in training only" if heads else "network"
    cells.append(("Parameters", short(network), extra))
    body = "".join(
        f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
        f"<dd>{note}</dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="tiles">{body}</dl>'


def sample_grids(run: Run) -> list[tuple[int, Path]]:
    """Saved sample grids by step."""
    found = (
        (re.fullmatch(r"step_(\d+)\.png", path.name), path)
        for path in run.workdir.glob("samples/step_*.png")
    )
    return sorted((int(match[1]), path) for match, path in found if match)


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
    """Quality first, then what the optimizer saw."""
    last, series = max(run.step, 1), run.series
    figures = []
    for key, (label, _) in QUALITY.items():
        level = number(run.results, "reference", f"train_{key}")
        if f"eval/{key}" in series or lookup(run.config, "eval", "proxy"):
            figures.append(
                curve(label, series.get(f"eval/{key}"), last,
                      functools.partial(shown, key), zero=True, level=level)
            )  # fmt: skip
    figures += ['<div class="note"><p><span class="key thin">as logged</span> '
                '<span class="key">running mean over a twentieth of the log</span> ']
    aligned = lookup(run.config, "align", "vae", "enabled")
    for key, (label, zero, smoothed) in CURVES.items():
        if key in series or aligned or "align" not in key:
            figures.append(
                curve(label, series.get(key), last, short, zero=zero, smoothed=smoothed)
            )
    return section("Curves", lead, f'<div class="charts">{"".join(figures)}</div>')
