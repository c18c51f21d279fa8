"""What a run left in its workdir, read so that nothing missing or broken is fatal."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from sra2_jax.errors import UserError
from sra2_jax.report.curves import Series

WARMUP = 0.1  # share of the log left out of the median speed

# section of config.align -> the method that it alone is, what a block is aligned with
METHODS = {
    "encoder": ("REPA", "an encoder's features of the image"),
    "teacher": ("SRA", "a later block of its moving average"),
    "vae": ("SRA 2", "the same latents"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What was found in a workdir; a file that is missing or broken is empty here."""

    workdir: epath.Path
    config: dict[str, Any]
    versions: dict[str, Any]
    run: dict[str, Any]
    results: dict[str, Any]
    series: dict[str, Series]

    @property
    def name(self) -> str:
        return str(lookup(self.config, "name") or self.workdir.resolve().name)

    @property
    def aligned(self) -> list[str]:
        """The sections of config.align that are on."""
        return [
            n for n in METHODS if lookup(self.config, "align", n, "enabled") is True
        ]

    @property
    def method(self) -> str:
        """What training with them is called: "SRA 2", "REPA + SRA 2", "vanilla"."""
        return " + ".join(METHODS[n][0] for n in self.aligned) or "vanilla"

    @property
    def date(self) -> str:
        """The day the run began: from versions.json, else the age of the config."""
        if noted := lookup(self.versions, "date"):
            return str(noted)[:10]
        written = (self.workdir / "config.json").stat().mtime
        return time.strftime("%Y-%m-%d", time.gmtime(written))

    @property
    def speed(self) -> float | None:
        """Median images a second, without the first rows: they hold the compilation."""
        if "images_per_second" not in self.series:
            return None
        _, values = self.series["images_per_second"]
        return float(np.median(values[math.ceil(WARMUP * (len(values) - 1)) :]))

    def newest(self, key: str) -> tuple[float | None, int]:
        """A quality metric's newest value and step, of results.json or the log."""
        value = number(self.results, "metrics", key)
        step = int(number(self.results, "step") or 0)
        if f"eval/{key}" in self.series:
            steps, values = self.series[f"eval/{key}"]
            if value is None or steps[-1] > step:
                return float(values[-1]), int(steps[-1])
        return value, step

    @property
    def step(self) -> int:
        """The last step that anything was logged for."""
        return int(max((steps[-1] for steps, _ in self.series.values()), default=0))


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file; empty if the file is missing or not (yet) an object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: epath.Path) -> dict[str, Series]:
    """Each metric's series. Of a step logged twice (a resumed run) the later wins."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the line being written, or one cut by a crash
            continue
        step = number(row, "step")
        if step is None:
            continue
        for key in row.keys() - {"step"}:
            value = number(row, key)
            if value is not None:
                found.setdefault(key, {})[step] = value
    tables = {key: np.array(sorted(rows.items())) for key, rows in found.items()}
    return {key: (table[:, 0], table[:, 1]) for key, table in tables.items()}


def read_run(workdir: epath.Path) -> Run:
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
    if not isinstance(found, int | float) or isinstance(found, bool):
        return None
    try:
        return float(found) if math.isfinite(found) else None
    except OverflowError:  # an integer beyond float
        return None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested section with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        whole = f"{prefix}{key}"
        out |= flat(value, f"{whole}.") if isinstance(value, dict) else {whole: value}
    return out


def sample_grids(run: Run) -> list[tuple[int, epath.Path]]:
    """Saved sample grids by step."""
    found = (
        (re.fullmatch(r"step_(\d+)\.png", path.name), path)
        for path in run.workdir.glob("samples/step_*.png")
    )
    return sorted((int(match[1]), path) for match, path in found if match)


def picture(path: epath.Path, alt: str, side: int) -> str | None:
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
