"""What the training of the two networks shipped with the project shares."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sra2_jax.command import Parser
from sra2_jax.data.digits import load_digits


def run(
    about: str,
    save: Callable[[np.ndarray, Path], None],
    measure: Callable[[Path], dict[str, str]],
    readme: str,
) -> None:
    """A program that trains on uint8 images (N, 32, 32, 3), saves, measures what it
    saved and writes a README, with places for {minutes} and {rows}, the figures."""
    parser = Parser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().out
    start = time.monotonic()
    pixels, _ = load_digits("train")
    save(pixels, folder)
    minutes = f"{(time.monotonic() - start) / 60:.1f}"
    figures = measure(folder)
    for name, value in figures.items():
        print(f"{name}: {value}")
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    text = readme.format(minutes=minutes, rows=rows)
    (folder / "README.md").write_text(text, encoding="utf-8")
