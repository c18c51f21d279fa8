"""Do the metrics give known numbers on this machine: evaluate --selftest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from sra2_jax.metrics.moments import InceptionScore, Moments, frechet_distance
from sra2_jax.metrics.neighbours import precision_recall
from sra2_jax.programs import verify

D = 64  # features
EXACT, STREAMED = 1e-9, 1e-6


def with_moments(
    draw: np.random.Generator, count: int, mean: np.ndarray, root: np.ndarray
) -> np.ndarray:
    """`count` points whose sample mean is `mean` and whose covariance is root^T root,
    to rounding: normal draws, whitened, then mapped."""
    x = draw.normal(size=(count, mean.size))
    x -= x.mean(axis=0)
    x = np.linalg.qr(x)[0] * np.sqrt(count - 1)
    return x @ root + mean


def gaussians(draw: np.random.Generator) -> Iterator[verify.Result]:
    """Two Gaussians whose covariances share their axes: a closed form."""
    axes = np.linalg.qr(draw.normal(size=(D, D)))[0]
    spreads = draw.uniform(0.5, 2, size=(2, D))
    means = draw.normal(size=(2, D))
    moments = []
    for spread, mean in zip(spreads, means, strict=True):
        points = with_moments(draw, 500, mean, spread[:, None] * axes)
        summary = Moments("selftest")
        for part in np.array_split(points, 7):
            summary.add(part)
        moments.append((summary.mean, summary.cov()))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum(
        (spreads[0] - spreads[1]) ** 2
    )
    ours = frechet_distance(*moments[0], *moments[1])
    yield "Frechet distance of two Gaussians", abs(ours / expected - 1), EXACT
    scale = float(np.trace(moments[0][1]))
    same = frechet_distance(*moments[0], *moments[0])
    yield "Frechet distance of identical sets, 0", abs(same) / scale, EXACT


def streaming(draw: np.random.Generator) -> Iterator[verify.Result]:
    """Float32 features far from zero, in uneven batches, against two passes."""
    points = (1e3 + draw.normal(size=(1000, D))).astype(np.float32)
    summary = Moments("selftest")
    for part in np.split(points, [1, 30, 400]):
        summary.add(part)
    expected = np.cov(points.astype(np.float64), rowvar=False)
    error = verify.relative_error(summary.cov(), expected)
    yield "streamed covariance", error, STREAMED


def inception_score() -> Iterator[verify.Result]:
    """K equally likely, certain classes score K; no information scores 1."""
    for name, probabilities, expected in (
        ("certain", np.tile(np.eye(10), (60, 1)), 10.0),
        ("uniform", np.full((600, 10), 0.1), 1.0),
    ):
        score = InceptionScore(100)
        score.add(probabilities[:250])
        score.add(probabilities[250:])
        error = abs(score.value() / expected - 1)
        yield f"Inception Score, {name} classes", error, STREAMED


def neighbours(draw: np.random.Generator) -> Iterator[verify.Result]:
    """Two far clusters: the samples fill one, and a place where nothing real is."""
    cluster = draw.uniform(size=(200, D)).astype(np.float32)
    real = np.concatenate([cluster, cluster + 100])
    samples = np.concatenate([cluster, cluster[:50] - 100])
    precision, recall = precision_recall(real, samples)
    yield "precision, 200 of 250", abs(precision - 0.8), EXACT
    yield "recall, 200 of 400", abs(recall - 0.5), EXACT
    yield "identical sets", abs(2 - sum(precision_recall(real, real))), EXACT


def selftest(golden: Path | None) -> int:
    """Print a line a check; return the exit status, 1 if any failed.

    golden: folder whose adm_metrics.npz and inception.npz are checked too.

    Raises:
      UserError: no such files in `golden`.
    """
    draw = np.random.default_rng(0)
    results = [*gaussians(draw), *streaming(draw), *inception_score()]
    results += neighbours(draw)
    failed = sum([not verify.passes("selftest", result) for result in results])
    device = jax.devices()[0]
    print(
        f"{len(results) - failed} passed, {failed} failed; jax {jax.__version__} on "
        f"{device.platform} ({device.device_kind})"
    )
    if golden is not None:
        kinds = (verify.adm_metrics, verify.inception)
        with jax.default_matmul_precision("highest"):
            failed += verify.verify(golden, kinds=kinds)
    return int(failed > 0)
