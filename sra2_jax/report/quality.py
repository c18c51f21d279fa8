"""The report's part on quality: metrics of samples against those of real images."""

from __future__ import annotations

import functools
from html import escape

from sra2_jax.metrics import METRICS
from sra2_jax.report.curves import curve, short
from sra2_jax.report.html import missing, pairs, section, text
from sra2_jax.report.rundir import Run, lookup, number

# metric -> title, direction, what real images are to it
QUALITY = {
    "accuracy": (*METRICS["accuracy"], "real images"),
    "frechet": (*METRICS["frechet"], "floor, real images"),
    "fid": (*METRICS["fid"], ""),
    "sfid": (*METRICS["sfid"], ""),
    "inception_score": (*METRICS["inception_score"], ""),
}
# config.eval.features -> the metrics that a run measures
MEASURED = {
    "digits": ("accuracy", "frechet"),
    "inception": ("fid", "inception_score", "sfid"),
}
TILES = 2  # metrics among the headline figures
REFERENCES = {
    "real": "Real images<small>distance: training set, share: held out</small>",
    "reconstruction": "Through the VAE<small>held-out real images</small>",
}
# shown apart from the rest
PROSE = ("metrics", "reference", "features", "note", "step", "versions")
HONEST = (
    "Neither FID nor any published number is to be set beside these proxies. Real "
    "images scored the same way give the level that good samples would reach."
)


def measured(run: Run) -> tuple[str, ...]:
    """The metrics that the run's config asks for."""
    return MEASURED.get(str(lookup(run.config, "eval", "features")), ())


def shown(key: str, value: float | None) -> str:
    """A metric's value as text: accuracies are shares."""
    if value is None or not key.endswith("accuracy"):
        return short(value)
    return f"{100 * value:.1f}%"


def quality_tiles(run: Run) -> list[tuple[str, str, str]]:
    """The first metrics' newest values, with the level of real images where known."""
    cells = []
    for key in measured(run)[:TILES]:
        label, _, level = QUALITY[key]
        value, step = run.newest(key)
        where = "not evaluated yet" if value is None else f"step {step:,}"
        real = number(run.results, "reference", f"real_{key}")
        where += "" if real is None else f"<br>{level} {shown(key, real)}"
        cells.append((label, shown(key, value), where))
    return cells


def quality_curves(run: Run) -> str:
    """A figure for each metric that was logged or will be."""
    drawn, levels = "", False
    for key, (label, _, _) in QUALITY.items():
        series = run.series.get(f"eval/{key}")
        if series is None and key not in measured(run):
            continue
        level = number(run.results, "reference", f"real_{key}")
        levels = levels or level is not None
        show = functools.partial(shown, key)
        drawn += curve(label, series, run.step, show, zero=True, level=level)
    if drawn:
        samples = text(lookup(run.config, "eval", "num_samples"))
        drawn += f'<div class="note"><p>A point scores {samples} samples.</p>'
        if levels:
            drawn += (
                '<p><span class="key">real training images,</span> scored the same '
                "way.</p>"
            )
        drawn += "</div>"
    return drawn


def results(run: Run) -> str:
    """The table of results.json, and what its numbers are and are not."""
    metrics = lookup(run.results, "metrics")
    if not isinstance(metrics, dict) or not metrics:
        why = "No results.json yet: the run is scored when it ends."
        if isinstance(metrics, dict) and "step" in run.results:
            why = "The last samples could not be scored."
        if not measured(run):
            why = "This run measures no quality: eval.features is empty."
        return section("Results", "", missing(why))
    rows = ""
    held = REFERENCES if lookup(run.results, "reference") else {}
    for key in metrics:
        label, direction, _ = QUALITY.get(key, (str(key), "", ""))
        values = [number(metrics, key)]
        values += [number(run.results, "reference", f"{k}_{key}") for k in held]
        cells = "".join(f"<td>{shown(key, v)}</td>" for v in values)
        rows += f"<tr><th>{escape(label)}<small>{direction}</small></th>{cells}</tr>"
    heads = "".join(f"<th>{what}</th>" for what in held.values())
    samples = f"Samples<small>step {text(lookup(run.results, 'step'))}</small>"
    table = (
        '<div class="scroll"><table class="numbers"><thead><tr><td></td>'
        f"<th>{samples}</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    features, note = (lookup(run.results, key) for key in ("features", "note"))
    words = [f"Features: {features}." if features else "", note]
    words += [HONEST] if held else []
    notes = "".join(f"<p>{escape(str(w))}</p>" for w in words if w)
    how = {k: v for k, v in run.results.items() if k not in PROSE}
    body = f'{table}<div class="after note">{notes}</div>{pairs(how)}'
    return section("Results", "", body)
