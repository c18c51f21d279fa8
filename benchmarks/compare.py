"""Train the five methods on the 8x8 digits, several seeds, and compare them.

    python -m benchmarks.compare --out=runs/compare

Each run is `python main.py` with configs/digits.py and one method's alignments
on; seeds are the outer loop, so that every method meets the machine's good and bad
hours. Runs that are finished are not repeated: the same command goes on after an
interruption. Prints the table and writes it as compare.md.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from sra2_jax.command import Parser, run_program
from sra2_jax.data.encode import EncodeOptions, encode
from sra2_jax.errors import UserError
from sra2_jax.run import Run
from tools.cost import METHODS

ROOT = Path(__file__).parents[1]
LEVEL = 0.9  # share recognised as asked
SHOWN = (1 / 3, 2 / 3, 1)  # of a run's steps


def train(out: Path, name: str, seed: int, rest: list[str]) -> Path:
    """Run main.py; returns the workdir."""
    slug = name.lower().replace(" ", "")
    workdir = out / f"{slug}_{seed}"
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'configs' / 'digits.py'}",
        f"--workdir={workdir}",
        f"--config.name={slug}",
        f"--config.seed={seed}",
        f"--config.data.dir={out / 'latents'}",
        "--config.run.sample_every=1000000",
        "--config.eval.every=100",
        *(f"--config.{key}={value}" for key, value in METHODS[name].items()),
        *rest,
    ]
    if subprocess.run(command).returncode:
        raise UserError(f"{workdir}: main.py failed, see above")
    return workdir


def read(workdir: Path) -> dict[str, float]:
    """Scores at SHOWN shares of the run, where LEVEL is passed, and speed.

    Seconds are those of training: without compiling, scoring and writing.
    """
    rows, config = Run(workdir).rows(), Run(workdir).config()
    rates = [r["images_per_second"] for r in rows if "loss" in r]
    seconds = config.batch_size / np.median(rates)  # of a step
    scores = {r["step"]: r for r in rows if "eval/accuracy" in r}
    passed = (s for s, r in sorted(scores.items()) if r["eval/accuracy"] >= LEVEL)
    reached = next(passed, float("nan"))
    found = {"steps": reached, "seconds": reached * seconds, "ms": 1000 * seconds}
    for share in SHOWN:
        step = round(share * config.steps)
        for key in ("accuracy", "frechet"):
            found[f"{key} {step}"] = scores[step][f"eval/{key}"]
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """The comparison in Markdown: means over the seeds, and their range."""
    keys = list(next(iter(results.values()))[0])
    names = {
        "steps": f"steps to {LEVEL:.0%}",
        "seconds": f"seconds to {LEVEL:.0%}",
        "ms": "ms a step",
    }
    titles = [names.get(key, key) for key in keys]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (len(keys) + 1) + "|"]
    for method, rows in results.items():
        cells = []
        for key in keys:
            values = np.array([row[key] for row in rows])
            form = "{:.1%}" if "accuracy" in key else "{:.3f}"
            form = form if " " in key else "{:.0f}"
            cells.append(
                f"{form} ({form} - {form})".format(
                    values.mean(), values.min(), values.max()
                )
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.epilog = "Keys of the config go to main.py, as --config.steps=500"
    parser.add_keys()
    arguments = parser.parse_args()
    rest = [f"--config.{k}={v}" for k, v in arguments.overrides.items()]
    out = arguments.out.absolute()
    if not (out / "latents").exists():
        names = {"images": "digits", "vae": "digits"}
        encode(
            EncodeOptions(
                str(out / "latents"), resolution=32, store_images=True, **names
            )
        )
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in range(arguments.seeds):
        for name in METHODS:
            results[name].append(read(train(out, name, seed, rest)))
    text = table(results)
    (out / "compare.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_program(main)
