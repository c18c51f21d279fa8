"""One self-contained page about a run: python -m sra2_jax report WORKDIR.

Reads what training wrote into the workdir and fills in report.html: pictures inline as
PNG, curves as SVG, nothing fetched. Whatever a young run lacks, the page names in its
place. Needs neither jax nor TensorFlow, so it opens runs copied from elsewhere.
"""

import os
import shlex
from collections.abc import Iterable
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from etils import epath

from sra2_jax.command import Parser, run_program
from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS
from sra2_jax.report.curves import curve, read_series, short, smooth
from sra2_jax.report.parts import figure, missing, pairs, text
from sra2_jax.run import Run, lookup, number, write_whole

LARGE, SMALL = 1280, 768  # pixels of a picture, of one in the strip; larger are reduced
STRIP = 24  # pictures in it

# key in metrics.jsonl -> title; {}: of each alignment
CURVES = {
    "loss_denoise": "Denoising loss",
    "loss_align_{}": "Alignment loss, {}",
    "ratio_align_{}": "Aligned / denoising, {}",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}
# config.eval.features -> the metrics that a run measures; two of them are headlines
MEASURED = {
    "digits": ("accuracy", "frechet"),
    "inception": ("fid", "inception_score", "sfid"),
}
REFERENCES = {
    "real": "Real images<small>distance: training set, share: held out</small>",
    "reconstruction": "Through the VAE<small>held-out real images</small>",
}
# what results.json holds besides how samples were made
PROSE = ("metrics", "reference", "features", "note", "step", "versions")


def titles(alignments: Iterable[Any]) -> dict[str, str]:
    """Those of the curves of a run with these alignments, by key, in order."""
    names = list(alignments)
    return {
        key.format(name): title.format(name)
        for key, title in CURVES.items()
        for name in (names if "{}" in key else [""])
    }


def shown(key: str, value: float | None) -> str:
    """A metric's value as text: accuracies are shares."""
    if value is None or not key.endswith("accuracy"):
        return short(value)
    return f"{100 * value:.3g}%"


class Page:
    """What a run's folder says, and the parts of the page that show it.

    Raises:
      UserError: no run is there.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.grids = run, run.sample_grids()
        files = map(run.read, ("config", "versions", "run", "results"))
        self.config, self.versions, self.facts, self.results = files
        if not self.config:
            raise UserError(
                f"no run: {run.folder / 'config.json'} is missing or not readable: "
                "give the workdir of a run that has started"
            )
        self.series = read_series(run.rows())
        self.step = int(max((s[-1] for s, _ in self.series.values()), default=0))
        features = str(lookup(self.config, "eval", "features"))
        self.measured = MEASURED.get(features, ())
        self.methods = self._methods()

    def _methods(self) -> list[dict[str, Any]]:
        """Name, title, aim and depth of each alignment that is on. A run of an older
        version has not written them: then its section's name is all three."""
        if isinstance(found := self.facts.get("methods"), list):
            return [method for method in found if isinstance(method, dict)]
        sections = lookup(self.config, "align")
        return [
            {"name": n, "title": n, "aim": n, "depth": lookup(s, "depth")}
            for n, s in (sections.items() if isinstance(sections, dict) else ())
            if lookup(s, "enabled") is True
        ]

    def header(self) -> dict[str, str]:
        """Name, what was trained on what, when, and how far it is."""
        config, steps = self.config, number(self.config, "steps")
        name = str(lookup(config, "name") or self.run.folder.resolve().name)
        data, model = lookup(config, "data"), lookup(config, "model")
        source = str(lookup(data, "images") or lookup(data, "dir") or "").rstrip("/")
        claim = "".join(
            f", block {text(m.get('depth'))} aligned with {text(m.get('aim'))}"
            for m in self.methods
        )
        return {
            "name": text(name),
            "kind": " + ".join(text(m.get("title")) for m in self.methods) or "vanilla",
            "depth": text(lookup(model, "depth")),
            "width": text(lookup(model, "width")),
            "claim": claim,
            "parameters": short(number(self.facts, "parameters", "network")),
            "steps": short(steps),
            "batch": text(lookup(config, "batch_size")),
            "source": text(source.rpartition("/")[2]),  # not the author's home
            "resolution": text(lookup(data, "resolution")),
            "date": text(str(lookup(self.versions, "date"))[:10]),
            "finished": "hidden" if steps is None or self.step >= steps else "",
            "step": f"{self.step}",
            "end": f"{steps}",
        }

    def level(self, key: str, kind: str = "real") -> float | None:
        """What real images score."""
        return number(self.results, "reference", f"{kind}_{key}")

    def tiles(self) -> str:
        """The headline figures, each with what to hold it against."""
        head = {f"eval/{key}": METRICS[key][0] for key in self.measured[:2]}
        cells = []
        for key in head or ("loss_denoise", "grad_norm"):
            value, note = None, "not logged yet"
            if key in self.series:
                steps, values = self.series[key]
                value, note = smooth(values)[-1], f"step {steps[-1]:,.0f}"
            metric = key.removeprefix("eval/")
            if (real := self.level(metric)) is not None:
                note += f"<br>real images {shown(metric, real)}"
            cells.append((head.get(key) or CURVES[key], shown(metric, value), note))
        _, speeds = self.series.get("images_per_second", (None, ()))
        speed = float(np.median(speeds)) if len(speeds) else None
        count = number(self.versions, "device_count") or 1
        device = f"{count} x {text(lookup(self.versions, 'device'))}"
        seconds = number(self.facts, "compile_seconds")
        network, heads = (
            number(self.facts, "parameters", kind) for kind in ("network", "heads")
        )
        more = f"+ {short(heads)} in the head,<br>training only" if heads else ""
        cells += [
            (CURVES["images_per_second"], short(speed), f"median<br>{device}"),
            ("Compile time, s", short(seconds), "before the first step"),
            ("Parameters", short(network), more),
        ]
        return "".join(
            f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
            f"<dd>{note}</dd></div>"
            for label, value, note in cells
        )

    def panel(self) -> str:
        """Real images, the same through the VAE, and the newest samples."""
        figures = [
            (self.run.images / "real.png", "Real", "images held out from training"),
            (
                self.run.images / "reconstruction.png",
                "Reconstruction",
                "real latents decoded",
            ),
        ]
        for step, path in self.grids[-1:]:
            figures.append((path, "Samples", f"step {step:,}, one class to a row"))
        body = "".join(
            figure(path, f"{label}: {what}", f"<b>{label}</b> {what}", LARGE)
            for path, label, what in figures
        )
        return body or missing("No pictures yet: training writes them to images/.")

    def strip(self) -> dict[str, str]:
        """The sample grids in order; report.js adds a large one and a slider."""
        grids, chosen = self.grids, ""
        if len(grids) > STRIP:
            chosen = f"{STRIP} of the {len(grids)} saved grids, evenly spaced."
            places = np.linspace(0, len(grids) - 1, STRIP).round().astype(int)
            grids = [grids[i] for i in places]
        drawn = [figure(p, f"Step {s:,}", f"{s:,}", SMALL) for s, p in grids]
        figures = list(filter(None, drawn))
        body = "".join(figures) or missing(
            "No samples yet: training writes the first grid to samples/."
        )
        return {"strip": body, "last": str(len(figures) - 1), "chosen": chosen}

    def curves(self) -> str:
        """Quality, where the run measures it, then what the optimizer saw."""
        drawn = ""
        for key in dict.fromkeys((*self.measured, *METRICS)):
            series = self.series.get(f"eval/{key}")
            if series or key in self.measured:
                show, level = partial(shown, key), self.level(key)
                drawn += curve(METRICS[key][0], series, self.step, show, level)
        if drawn:
            samples = text(lookup(self.config, "eval", "num_samples"))
            drawn += (
                f'<div class="note"><p>A point scores {samples} samples.</p><p><span '
                'class="key">real training images,</span> scored the same way.</p>'
                "</div>"
            )
        for key, title in titles(m.get("name") for m in self.methods).items():
            drawn += curve(title, self.series.get(key), self.step)
        return drawn

    def scores(self) -> str:
        """The table of results.json, and what its numbers are and are not."""
        metrics = lookup(self.results, "metrics")
        if not isinstance(metrics, dict) or not metrics:
            return missing("No metrics: the end measures what eval.features asks for.")
        kinds = REFERENCES if self.results.get("reference") else {}
        samples = f"Samples<small>step {text(self.results.get('step'))}</small>"
        heads = "".join(f"<th>{head}</th>" for head in (samples, *kinds.values()))
        rows = ""
        for key in metrics:
            title, direction = METRICS.get(key, (key, ""))
            values = [number(metrics, key), *(self.level(key, kind) for kind in kinds)]
            cells = "".join(f"<td>{shown(key, value)}</td>" for value in values)
            rows += f"<tr><th>{text(title)}<small>{direction}</small></th>{cells}</tr>"
        words = [self.results.get(key) for key in ("features", "note")]
        notes = (f"<p>{text(line)}</p>" for line in words if line)
        how = {k: v for k, v in self.results.items() if k not in PROSE}
        return (
            '<div class="scroll"><table class="numbers"><thead><tr><td></td>'
            f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
            f'<div class="after note">{"".join(notes)}</div>{pairs(how)}'
        )

    def configuration(self) -> str:
        """Every key of the resolved config, a section to fold out each."""
        nested = {k: v for k, v in self.config.items() if isinstance(v, dict)}
        whole = {k: v for k, v in self.config.items() if k not in nested}
        return "".join(
            f"<details><summary>{text(label)}</summary>{pairs(values)}</details>"
            for label, values in ({"run as a whole": whole} | nested).items()
        )

    def command(self) -> str:
        """What trains it again, made from the config and the commit."""
        words = ["python", "main.py", f"--config={self.config.get('name')}"]
        for key in ("seed", "steps", "batch_size"):
            words.append(f"--config.{key}={self.config.get(key)}")
        commit = str(self.versions.get("commit", "unknown"))
        checkout = (
            "" if commit == "unknown" else f"git checkout {shlex.quote(commit)}\n"
        )
        return escape(checkout + shlex.join(words))

    def html(self) -> str:
        """The whole document."""
        folder = Path(__file__).parent
        page, style, script = (
            (folder / f"report.{kind}").read_text() for kind in ("html", "css", "js")
        )
        return Template(page).substitute(
            self.header() | self.strip(),
            tiles=self.tiles(),
            panel=self.panel(),
            curves=self.curves(),
            results=self.scores(),
            configuration=self.configuration(),
            versions=pairs(self.versions) if self.versions else missing("None noted."),
            command=self.command(),
            style=style,
            script=script,
        )


def write_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Write WORKDIR/report.html and return its path.

    Raises:
      UserError: no run is there.
    """
    run = Run(workdir)
    write_whole(run.report, Page(run).html())
    return run.report


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdir", help="folder of a training run")
    print(f"wrote {write_report(parser.parse_args().workdir)}")


if __name__ == "__main__":
    run_program(main)
