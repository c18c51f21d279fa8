"""The quickstart, timed and held against floors: python -m benchmarks.quickstart.

Runs main.py as a newcomer does, in a folder of its own; exit status 1 if its samples
are worse than they should be. Compiled programs of an earlier run are not used.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sra2_jax.command import Parser, run_program
from sra2_jax.storage import read_json

ROOT = Path(__file__).parents[1]
# Of 500 samples; runs of other processors and versions differ by about 0.01 and 0.1.
LEAST_RECOGNISED, LARGEST_FRECHET = 0.95, 1.25


def complaints(scores: Mapping[str, float]) -> list[str]:
    """What is worse than it should be: one line each."""
    found = []
    if not scores["accuracy"] >= LEAST_RECOGNISED:
        share = scores["accuracy"]
        found.append(f"{share:.1%} recognised as asked, below {LEAST_RECOGNISED:.0%}")
    if not scores["frechet"] <= LARGEST_FRECHET:
        distance = scores["frechet"]
        found.append(f"Fréchet distance {distance:.3f}, above {LARGEST_FRECHET}")
    return found


def train(folder: str, *words: str) -> float:
    """Run main.py with these words, into folder/run; seconds."""
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    command = [sys.executable, f"{ROOT}/main.py", f"--workdir={folder}/run", *words]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return time.perf_counter() - began


def main() -> int:
    Parser(description=(__doc__ or "").splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(folder)
        scores = read_json(Path(folder) / "run" / "results.json")["metrics"]
    print(f"{seconds:.0f} s: {scores['accuracy']:.1%} recognised", end=", ")
    print(f"Fréchet distance {scores['frechet']:.3f}")
    found = complaints(scores)
    for line in found:
        print(f"FAILED: {line}")
    return int(bool(found))


if __name__ == "__main__":
    run_program(main)
