"""Do samples show what their prompts ask: python -m benchmarks.quickstart_text.

Trains configs/quickstart_text.py as a newcomer does, or takes a RUN of it, and asks for
digits, for pairs that training showed and for the ten pairs that it did not. A support
vector machine, fitted on the training digits, tells what each half of a picture shows.
"""

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from PIL import Image
from sklearn.svm import SVC

import sra2_jax as sra
from benchmarks.quickstart import ROOT, train
from sra2_jax.command import Parser, run_program
from sra2_jax.data.digits import WORDS, held_out, load_digits, squeezed, to_grey
from sra2_jax.generator import grid
from sra2_jax.metrics.features import GAMMA

EACH = 300  # pictures of a kind, about
COLUMNS = 16  # of the picture
PAIRS = [*itertools.product(range(10), repeat=2)]
DIGITS = [(digit,) for digit in range(10)]
KINDS: dict[str, list[Any]] = {
    "a digit": DIGITS,
    "a pair that training showed": [pair for pair in PAIRS if not held_out(*pair)],
    "a pair that it did not": [pair for pair in PAIRS if held_out(*pair)],
}


def prompt(wanted: Sequence[int]) -> str:
    words = [WORDS[digit] for digit in wanted]
    return (
        f"two digits, {' then '.join(words)}" if words[1:] else f"the digit {words[0]}"
    )


class Judge:
    """What pictures (N, 32, 32, 3) show: a digit (N, 1), or two (N, 2)."""

    def __init__(self) -> None:
        images, labels = load_digits("train", "mnist")
        self.whole, self.half = (
            SVC(gamma=GAMMA["mnist"]).fit(to_grey(x, "mnist"), labels)
            for x in (images, squeezed(images).repeat(2, axis=2))
        )

    def __call__(self, pictures: np.ndarray, count: int) -> np.ndarray:
        if count == 1:
            return self.whole.predict(to_grey(pictures, "mnist"))[:, None]
        halves = np.split(pictures, 2, axis=2)
        return np.stack(
            [self.half.predict(to_grey(x.repeat(2, axis=2), "mnist")) for x in halves],
            axis=1,
        )


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished run")
    parser.add_argument("--out", metavar="PNG", help="the pairs that training lacked")
    flags = parser.parse_args()
    with ExitStack() as stack:
        folder = flags.run or stack.enter_context(tempfile.TemporaryDirectory())
        if not flags.run:
            config = ROOT / "configs" / "quickstart_text.py"
            print(f"trained in {train(folder, f'--config={config}'):.0f} s")
            folder = f"{folder}/run"
        run, judge = sra.load_run(folder), Judge()
        for kind, asked in KINDS.items():
            rows = np.repeat(asked, -(-EACH // len(asked)), axis=0)
            prompts = [prompt(row) for row in rows]
            pictures = sra.generate(run.program, run.params, prompts)
            right = judge(pictures, rows.shape[1]) == rows
            each, both = right.mean(), right.all(axis=1).mean()
            print(f"{kind}: {both:.1%} of {len(rows)} right, digit by digit {each:.1%}")
    if flags.out:  # of the last kind
        rows = pictures.reshape(len(asked), -1, *pictures.shape[1:])[:, :COLUMNS]
        picture = grid(rows.reshape(-1, *pictures.shape[1:]), COLUMNS)
        Image.fromarray(picture.repeat(2, axis=0).repeat(2, axis=1)).save(flags.out)


if __name__ == "__main__":
    run_program(main)
