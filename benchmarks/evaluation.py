"""Time the metrics of sets of images on made-up features, without a network.

    python -m benchmarks.evaluation --samples=50000 --reference=10000

Prints the seconds from batches of 500 float32 features to mean and covariance, those of
the Frechet distance between two such sets, and the seconds of Precision and Recall with
what they add to the memory of the features themselves.
"""

import resource
import sys
import time

import numpy as np

from sra2_jax.command import Parser, run_program
from sra2_jax.metrics.moments import Moments, frechet_distance, precision_recall

BATCH = 500


def make(draw: np.random.Generator, count: int, mixing: np.ndarray) -> np.ndarray:
    """Features (count, D) >= 0 in float32: normal draws through mixing (D, D)."""
    points = np.empty((count, len(mixing)), np.float32)
    for start in range(0, count, BATCH):
        part = points[start : start + BATCH]
        part[:] = draw.standard_normal(part.shape, np.float32) @ mixing
    return np.maximum(points, 0, out=points)


def moments(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    summary = Moments("features")
    for start in range(0, len(points), BATCH):
        summary.add(points[start : start + BATCH])
    return summary.mean, summary.cov()


def peak() -> float:
    """The most memory the process has held so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal([arguments.features] * 2, np.float32)
    # Few directions hold most of the variance, as with Inception's features.
    mixing /= np.arange(1, arguments.features + 1, dtype=np.float32)[:, None]
    samples, reference = (
        make(draw, count, mixing) for count in (arguments.samples, arguments.reference)
    )
    held = (samples.nbytes + reference.nbytes) / 1e9
    # First, so that the peak is not that of the covariances.
    before, start = peak(), time.perf_counter()
    precision, recall = precision_recall(reference, samples)
    seconds, added = time.perf_counter() - start, peak() - before
    print(
        f"precision {precision:.4f}, recall {recall:.4f}: {len(reference):,} x "
        f"{len(samples):,} x {arguments.features}: {seconds:.1f} s, {added:.2f} GB "
        f"above the {held:.2f} GB of the features",
        flush=True,
    )
    other = moments(reference)
    start = time.perf_counter()
    own = moments(samples)
    middle = time.perf_counter()
    distance = frechet_distance(*own, *other)
    end = time.perf_counter()
    print(
        f"Frechet distance {distance:.4f}: {middle - start:.1f} s for the statistics "
        f"of {len(samples):,} x {arguments.features}, {end - middle:.1f} s for the "
        "distance"
    )


if __name__ == "__main__":
    run_program(main)
