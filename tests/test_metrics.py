"""Metrics against ADM's values, closed forms and two-pass float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from sra2_jax.data.digits import load_digits
from sra2_jax.errors import UserError
from sra2_jax.metrics import moments
from sra2_jax.metrics.features import make_features
from sra2_jax.metrics.moments import (
    InceptionScore,
    Moments,
    frechet_distance,
    gaussian,
    kernel_distance,
    precision_recall,
)
from sra2_jax.models.dinov2 import preprocess
from sra2_jax.programs.verify import compiled
from sra2_jax.sharding import make_mesh
from sra2_jax.weights import load_dinov2


def streamed(features, cuts):
    """Streamed in uneven batches."""
    summary = Moments("samples.npz")
    for part in np.split(features, cuts):
        summary.add(part)
    return summary


def direct(reference, samples, k=3):
    """Precision and recall from all differences in float64."""

    def squared(a, b):
        return ((a[:, None] - b) ** 2).sum(axis=-1)

    reference, samples = (x.astype(np.float64) for x in (reference, samples))
    across = squared(reference, samples)
    radii = [np.sort(squared(x, x), axis=1)[:, k] for x in (reference, samples)]
    return (
        (across <= radii[0][:, None]).any(axis=0).mean(),
        (across <= radii[1]).any(axis=1).mean(),
    )


# Frechet distance


def test_covariances_without_full_rank():
    """Few images: equal sets are at distance 0; in planes at right angles, the
    distance is the sum of the traces."""
    points = np.random.default_rng(0).normal(size=(20, 100)) ** 3
    mean, cov = gaussian(points)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-6 * np.trace(cov)
    one, other = points * (np.arange(100) < 30), points * (np.arange(100) >= 30)
    cov1, cov2 = gaussian(one)[1], gaussian(other)[1]
    distance = frechet_distance(mean, cov1, mean, cov2)
    assert distance == pytest.approx(np.trace(cov1) + np.trace(cov2), rel=1e-6)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (np.zeros(3), np.eye(3), "features, the other"),
        (np.zeros(2), np.diag([1, -1e-3]), "negative eigenvalue -0.001"),
    ],
)
def test_no_statistics(mean, cov, message):
    sides = (mean, cov), (np.zeros(2), np.eye(2))
    for one, other in (sides, sides[::-1]):
        with pytest.raises(UserError, match=message):
            frechet_distance(*one, *other)


# Streamed statistics


@pytest.mark.parametrize("offset", [0, 1e6])
def test_streaming_equals_numpy(offset):
    draw = np.random.default_rng(0)
    points = draw.normal(size=(2600, 5)) @ draw.normal(size=(5, 5)) + offset
    summary = streamed(points, [1, 2, 900, 2111, 2599])
    assert summary.count == 2600
    np.testing.assert_allclose(
        summary.mean, points.mean(axis=0), rtol=1e-14, atol=1e-14
    )
    # Taking the offset away again is exact, so numpy's two passes lose nothing.
    exact = np.cov(points - offset, rowvar=False)
    np.testing.assert_allclose(summary.cov(), exact, rtol=1e-8 if offset else 1e-12)


def test_unusable_features():
    points = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    bad = np.where(np.arange(36).reshape(9, 4) == 25, np.nan, points)
    same = np.tile(points[:1], (1500, 1))
    same[::2] *= 1 + 1e-7  # the last bit of a float32
    for features in (bad, points[:1], same, np.zeros((5, 4))):
        with pytest.raises(UserError, match=r"samples\.npz: .* different pictures"):
            streamed(features, []).cov()


# Inception Score


def test_inception_score_in_batches(golden):
    """ADM's, of 300 images in uneven batches; K certain classes score K, and the last
    split, of one class, 1."""
    adm = np.load(golden / "adm_metrics.npz")
    score, certain = InceptionScore(50), InceptionScore(40)
    for part in np.split(adm["probs"], [1, 49, 170]):
        score.add(part)
    expected = float(adm["inception_score_split_50"])
    assert score.value() == pytest.approx(expected, rel=1e-5)
    certain.add(np.eye(4)[np.arange(40) % 4])
    certain.add(np.eye(4)[np.zeros(3, int)])
    assert certain.value() == pytest.approx((4 + 1) / 2, rel=1e-12)


# Precision and recall


def test_precision_and_recall_are_those_of_all_distances(monkeypatch):
    """Far from zero, for any k, in pieces or at once."""
    draw = np.random.default_rng(0)
    reference = 300 + draw.normal(size=(90, 6)).astype(np.float32)
    samples = 300.5 + draw.normal(size=(70, 6)).astype(np.float32)
    for k, memory in ((1, 256), (5, 0.01)):
        monkeypatch.setattr(moments, "MEMORY", memory)
        found = precision_recall(reference, samples, k)
        assert found == direct(reference, samples, k)
        assert 0 < found[0] < 1
        assert 0 < found[1] < 1


def test_copies_are_neighbours():
    """Of 4 copies each the third neighbour is a copy: balls of radius 0, which hold
    copies of their centre in the other set and nothing else."""
    draw = np.random.default_rng(0)
    points = draw.normal(size=(60, 16)).astype(np.float32)
    reference = np.repeat(points[:40], 4, axis=0)
    samples = np.repeat(points[30:], 4, axis=0)
    assert precision_recall(reference, samples) == (10 / 30, 10 / 40)
    # Of 3 copies it is another point.
    thrice = np.repeat(points, 3, axis=0)
    shifted = thrice + np.float32(1e-2)
    assert precision_recall(thrice, shifted) == (1, 1)


def test_too_few_points():
    points = np.random.default_rng(0).normal(size=(9, 4))
    for sides in ((points, points[:3]), (points[:0], points)):
        with pytest.raises(UserError, match="need more than 3 images in each set"):
            precision_recall(*sides)


# Kernel distance


def test_kernel_distance_is_the_unbiased_estimate():
    """Against sums over pairs; about 0 for one distribution; blocks agree."""
    draw = np.random.default_rng(0)
    real, fake = draw.normal(size=(5, 3)), draw.normal(0.7, 1, size=(5, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = sum(k(s[i], s[j]) for s in (real, fake) for i, j in pairs) / 20
    across = np.mean([k(x, y) for x in real for y in fake])
    found = kernel_distance(real.astype(np.float32), fake)
    assert found == pytest.approx(within - 2 * across, rel=1e-5)
    many = draw.normal(size=(2, 2000, 3))
    values = [kernel_distance(many[0], many[1] + shift, 500) for shift in (0, 0.5)]
    assert abs(values[0]) < 0.02 < values[1]
    whole = kernel_distance(many[0], many[1] + 0.5, 2000)
    assert values[1] == pytest.approx(whole, rel=0.2)
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(real[:1], fake)


def test_dinov2s_class_token_is_what_is_compared():
    """As the network gives it at its own size, for any number of images."""
    images = load_digits("test")[0][:5]
    found = make_features("dinov2", "digits", make_mesh(), 8)(images)
    encoder, params = load_dinov2("digits")
    pixels = preprocess(jnp.asarray(images), 32)
    expected = compiled(encoder, params, pixels)[:, 0]
    np.testing.assert_allclose(found["pool"], expected, rtol=1e-4, atol=1e-4)
    assert found["pool"].std(axis=0).min() > 0
