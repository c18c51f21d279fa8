"""One self-contained page about a run: python -m sra2_jax report WORKDIR.

Reads what training wrote into the workdir and fills in report.html: pictures inline as
PNG, curves as SVG, nothing fetched. Whatever a young run lacks, the page names in its
place. Needs neither jax nor TensorFlow, so it opens runs copied from elsewhere.
"""

import base64
import io
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from sra2_jax.command import Parser
from sra2_jax.config import DIGITS
from sra2_jax.errors import UserError
from sra2_jax.metrics import METRICS
from sra2_jax.report.curves import curve, read_series, short, smooth
from sra2_jax.run import Run, lookup, number
from sra2_jax.storage import write_whole

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
TITLES = CURVES | {f"eval/{key}": title for key, (title, _) in METRICS.items()}
# config.eval.features -> the metrics that a run measures; the first two are headlines
MEASURED = {
    **dict.fromkeys(DIGITS, ("eval/accuracy", "eval/frechet")),
    "inception": ("eval/fid", "eval/inception_score", "eval/sfid"),
    "dinov2": ("eval/fd_dinov2", "eval/kernel_distance"),
}
HEAD = (
    "<td></td><td>Samples</td><td>Real images<small>distance: training set, share: "
    "held out</small></td><td>Through the VAE<small>held-out real images</small></td>"
)
PICTURES = {
    "real": ("Real", "images held out from training"),
    "reconstruction": ("Reconstruction", "real latents decoded"),
}
PROSE = ("features", "note")  # keys of results.json


def titles(alignments: Iterable[Any]) -> dict[str, str]:
    """Those of the curves of a run with these alignments, by key, in order."""
    names = list(alignments)
    return {
        key.format(name): title.format(name)
        for key, title in CURVES.items()
        for name in (names if "{}" in key else [""])
    }


def text(value: Any) -> str:
    """Any value of a JSON file, escaped; no thousands separators, it may be an id."""
    return escape(value if isinstance(value, str) else json.dumps(value)) or "(empty)"


def missing(what: str) -> str:
    return f'<p class="missing">{escape(what)}</p>'


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Those of nested sections with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def pairs(values: Mapping[str, Any]) -> str:
    """A table of keys and values."""
    row = "<div><dt>{}</dt><dd>{}</dd></div>"
    rows = (row.format(text(key), text(value)) for key, value in flat(values).items())
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def figure(path: epath.Path, label: str, what: str, side: int) -> str:
    """The picture in a file, at most `side` pixels wide; "" where none can be read."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    except (OSError, SyntaxError, ValueError):  # Pillow's for a half-written PNG
        return ""
    # small pictures are enlarged by the page: show their pixels, do not blur them
    look = ' class="pixels"' if image.width <= 400 else ""
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img{look} width="{image.width}" height="{image.height}" '
        f'alt="{label} {what}" src="data:image/png;base64,{source}">'
        f"<figcaption><b>{label}</b> {what}</figcaption></figure>"
    )


class Fields(Template):
    """report.html: ${...} are keys of the config, or what a Page adds."""

    idpattern = r"[a-z_.]+"


class Page:
    """What a run's folder says, and the parts of the page that show it.

    Raises UserError: no run is there.
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
        self.prompts = self.facts.get("prompts", ())  # of the rows of a grid
        self.measured = MEASURED.get(lookup(self.config, "eval", "features"), ())
        # Of each alignment that is on; a run of an older version has not written them.
        self.methods: list[dict[str, Any]] = self.facts.get("methods") or [
            {"name": name, "title": name, "aim": name, "depth": section.get("depth")}
            for name, section in self.config.get("align", {}).items()
            if section.get("enabled")
        ]

    def header(self) -> dict[str, Any]:
        """What was trained on what, when, and how far it is."""
        data = self.config.get("data", {})
        source = data.get("images") or data.get("dir")
        claims = (f"block {m['depth']} aligned with {m['aim']}" for m in self.methods)
        return {
            "kind": " + ".join(m["title"] for m in self.methods) or "vanilla",
            "network": "An MMDiT"
            if lookup(self.config, "text", "encoder")
            else "A SiT",
            "claim": ", ".join(claims) or "nothing aligned",
            "parameters": short(number(self.facts, "parameters", "network")),
            "source": Path(str(source)).name,  # not the author's home
            "date": str(self.versions.get("date"))[:10],
            "step": self.step,
        }

    def level(self, key: str, kind: str = "real") -> float | None:
        """What real images score."""
        return number(self.results, "reference", f"{kind}_{key.removeprefix('eval/')}")

    def tiles(self) -> str:
        """The headline figures, each with what to hold it against."""
        cells = []
        heads = self.measured[:2] or ("loss_denoise", "grad_norm")
        for key in (*heads, "images_per_second"):
            value, note = None, "not logged yet"
            if key in self.series:
                steps, values = self.series[key]
                value, note = smooth(values)[-1], f"step {steps[-1]:,.0f}"
            if (real := self.level(key)) is not None:
                note += f"<br>real images {short(real)}"
            cells.append((TITLES[key], short(value), note))
        return "".join(
            f'<div class="tile"><dt>{label}</dt><dd class="value">{value}</dd>'
            f"<dd>{note}</dd></div>"
            for label, value, note in cells
        )

    def panel(self) -> str:
        """Real images, the same through the VAE, and the newest samples."""
        figures = [
            figure(self.run.images / f"{name}.png", *words, LARGE)
            for name, words in PICTURES.items()
        ]
        for step, path in self.grids[-1:]:
            kind = "prompt" if self.prompts else "class"
            what = f"step {step:,}, one {kind} to a row"
            figures.append(figure(path, "Samples", what, LARGE))
        nothing = "No pictures yet: training writes them to images/."
        if self.prompts:
            rows = "".join(f"<li>{text(prompt)}</li>" for prompt in self.prompts)
            figures.append(f"<ol>{rows}</ol>")
        return "".join(figures) or missing(nothing)

    def strip(self) -> dict[str, str]:
        """The sample grids in order; report.js adds a large one and a slider."""
        count = len(self.grids)
        chosen = f"{STRIP} of the {count} saved grids." if count > STRIP else ""
        places = np.linspace(0, count - 1, min(count, STRIP)).round().astype(int)
        grids = [self.grids[place] for place in places]
        drawn = [figure(path, f"Step {step:,}", "", SMALL) for step, path in grids]
        figures = [f for f in drawn if f]
        nothing = "No samples yet: training writes the first grid to samples/."
        body = "".join(figures) or missing(nothing)
        return {"strip": body, "last": str(len(figures) - 1), "chosen": chosen}

    def curves(self) -> str:
        """Quality, where the run measures it, then what the optimizer saw."""
        # None where the reference has no images.
        kernel = (
            ("eval/kernel_distance",) if "eval/kernel_distance" in self.series else ()
        )
        wanted = {key: TITLES[key] for key in (*self.measured, *kernel)}
        wanted |= titles(m["name"] for m in self.methods)
        return "".join(
            curve(title, self.series.get(key), self.step, self.level(key))
            for key, title in wanted.items()
        )

    def scores(self) -> str:
        """The table of results.json, and what its numbers are and are not."""
        metrics = self.results.get("metrics")
        if not metrics:
            return missing("No metrics: the end measures what eval.features asks for.")
        table = f"<tr>{HEAD}</tr>"
        for key, value in metrics.items():
            title, direction = METRICS.get(key, (text(key), ""))
            levels = (self.level(key, kind) for kind in PICTURES)
            cells = "".join(f"<td>{short(v)}</td>" for v in (value, *levels))
            name = f"{title}<small>{direction}</small>"
            table += f"<tr><td>{name}</td>{cells}</tr>"
        how = dict(self.results)
        for key in ("metrics", "reference", "versions"):
            how.pop(key, None)
        notes = [f"<p>{text(how.pop(key))}</p>" for key in PROSE if key in how]
        return (
            f'<div class="scroll"><table class="numbers">{table}</table></div>'
            f'<div class="after note">{"".join(notes)}</div>{pairs(how)}'
        )

    def command(self) -> str:
        """What trains it again, made from the config and the commit."""
        words = ["python", "main.py", f"--config={self.config.get('name')}"]
        for key in ("seed", "steps", "batch_size"):
            words.append(f"--config.{key}={self.config.get(key)}")
        checkout, commit = "", str(self.versions.get("commit", "unknown"))
        if commit != "unknown":
            checkout = f"git checkout {shlex.quote(commit)}\n"
        return escape(checkout + shlex.join(words))

    def html(self) -> str:
        """The whole document."""
        page, style, script = (
            Path(__file__).with_name(f"report.{kind}").read_text()
            for kind in ("html", "css", "js")
        )
        config, machine = flat(self.config), self.versions | self.facts
        for key in ("methods", "prompts"):
            machine.pop(key, None)
        steps = number(config, "steps") or 0
        words = {key: text(value) for key, value in (config | self.header()).items()}
        return Fields(page).substitute(
            defaultdict(lambda: "?", words | self.strip()),
            finished="hidden" if self.step >= steps else "",
            tiles=self.tiles(),
            panel=self.panel(),
            curves=self.curves(),
            results=self.scores(),
            configuration=pairs(config),
            machine=pairs(machine) if machine else missing("Not noted yet."),
            command=self.command(),
            style=style,
            script=script,
        )


def write_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Write WORKDIR/report.html and return its path. Raises UserError: no run there."""
    run = Run(workdir)
    write_whole(run.report, Page(run).html())
    return run.report


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdir", help="folder of a training run")
    print(f"wrote {write_report(parser.parse_args().workdir)}")
