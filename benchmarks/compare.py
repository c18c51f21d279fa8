"""Train the five methods on the quickstart's digits, several seeds, and compare them.

    python -m benchmarks.compare --out=runs/compare

Each run is `python main.py` with the quickstart's config and one method's alignments
on; seeds are the outer loop, so that every method meets the machine's good and bad
hours. Runs that are finished are not repeated: the same command goes on after an
interruption. Prints the table and writes it as compare.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sra2_jax.cost import METHODS
from sra2_jax.data.encode import encode
from sra2_jax.errors import UserError, run_program

ROOT = Path(__file__).parents[1]
LEVEL = 0.9  # share recognised as asked


def train(out: Path, name: str, seed: int, rest: list[str]) -> Path:
    """Run main.py; returns the workdir."""
    slug = name.lower().replace(" ", "")
    workdir = out / f"{slug}_{seed}"
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        f"--workdir={workdir}",
        f"--config.name={slug}",
        f"--config.seed={seed}",
        f"--config.data.dir={out / 'latents'}",
        "--config.run.sample_every=1000000",
        "--config.eval.every=100",
        *(f"--config.align.{s}.enabled={s in METHODS[name]}" for s in SECTIONS),
        *rest,
    ]
    if subprocess.run(command).returncode:
        raise UserError(f"{workdir}: main.py failed, see above")
    return workdir


SECTIONS = sorted({section for on in METHODS.values() for section in on})


def read(workdir: Path) -> dict[str, Any]:
    """Final scores, speed, and where the share of recognised digits passes LEVEL."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    config = json.loads((workdir / "config.json").read_text())
    speed = np.median([r["images_per_second"] for r in rows if "loss" in r][2:])
    scores = [(r["step"], r["eval/accuracy"]) for r in rows if "eval/accuracy" in r]
    reached = next((step for step, value in scores if value >= LEVEL), float("nan"))
    seconds = config["batch_size"] / speed  # of a step
    metrics = json.loads((workdir / "results.json").read_text())["metrics"]
    return {
        "accuracy": metrics["accuracy"],
        "frechet": metrics["frechet"],
        "steps": reached,
        "seconds": reached * seconds,
        "ms": 1000 * seconds,
    }


def cell(values: list[float], form: str) -> str:
    """Mean and range over the seeds."""
    mean, low, high = np.mean(values), min(values), max(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The comparison in Markdown, a row a method."""
    lines = [
        "| method | recognised as asked | Fréchet proxy | steps to 90% | "
        "training seconds to 90% | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        columns = {k: [row[k] for row in rows] for k in rows[0]}
        lines.append(
            f"| {name} | {cell(columns['accuracy'], '.1%')} "
            f"| {cell(columns['frechet'], '.3f')} | {cell(columns['steps'], '.0f')} "
            f"| {cell(columns['seconds'], '.0f')} | {cell(columns['ms'], '.0f')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.epilog = "Further flags go to main.py, as --config.steps=500"
    arguments, rest = parser.parse_known_args()
    out = arguments.out.absolute()
    if not (out / "latents").exists():
        encode("digits", out / "latents", "digits", 32, store_images=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(arguments.seeds):
        for name in METHODS:
            results[name].append(read(train(out, name, seed, rest)))
    text = table(results)
    (out / "compare.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_program(main)
