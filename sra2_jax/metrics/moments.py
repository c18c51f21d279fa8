"""FID's distance, Inception Score, and the statistics they need, batch by batch."""

import numpy as np
import scipy.linalg
from scipy.special import entr

from sra2_jax.errors import UserError

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)
# Images gathered before one matrix product: five times as fast as products of 64.
BLOCK = 1000
# float32 features of one picture may differ in their last bits: their variance is
# then this share of their mean square, at most.
SAME = 1e-13
# Rounding to float32 leaves a covariance asymmetries and negative eigenvalues that are
# smaller than this share of its largest entry or eigenvalue.
ROUNDING = 1e-5


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


class Moments:
    """Mean and unbiased covariance of features that come in batches, in float64.

    Means and centred second moments of blocks are merged (Chan, Golub, LeVeque 1979),
    so features far from zero lose nothing. Memory: two matrices of D x D and a block.

    Args:
      source: name of the images, for messages.

    Attributes:
      count: images so far.
    """

    def __init__(self, source: str) -> None:
        self.count = 0
        self._source = source
        self._waiting: list[np.ndarray] = []
        self._merged = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        """Take the features (n, D) of the next n images, n >= 0.

        Raises:
          UserError: features that are not finite.
        """
        # A copy: the caller may use its buffer again.
        features = np.array(features, np.float64)
        if not self.count:
            width = features.shape[1]
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if bad.size:
            raise UserError(
                f"{self._source}: image {self.count + int(bad[0])} (from 0) has "
                "features that are not finite: check that image and the network's "
                "weights"
            )
        self.count += len(features)
        self._waiting.append(features)
        if self.count - self._merged >= BLOCK:
            self._merge()

    def _merge(self) -> None:
        if self.count == self._merged:
            return
        block = np.concatenate([*self._waiting, np.empty((1, self._mean.size))])
        self._waiting = []
        n = len(block) - 1
        mean = block[:n].mean(axis=0)
        block[:n] -= mean
        # The distance of the two means counts like one more row.
        shift = mean - self._mean
        block[n] = shift * np.sqrt(n * self._merged / self.count)
        self._scatter += block.T @ block
        self._mean = self._mean + shift * (n / self.count)
        self._merged = self.count

    @property
    def mean(self) -> np.ndarray:
        """(D,)"""
        self._merge()
        return self._mean

    def cov(self) -> np.ndarray:
        """(D, D), the sum of products over count - 1.

        Raises:
          UserError: fewer than 2 images, or all with the same features.
        """
        mean = self.mean
        cov = self._scatter / max(self.count - 1, 1)
        if np.trace(cov) <= SAME * np.sum(mean**2):
            raise UserError(
                f"{self._source}: {self.count} images, all with the same features, "
                "have no covariance: give different pictures"
            )
        return cov


def check_gaussian(mean: np.ndarray, cov: np.ndarray) -> None:
    """See that a mean is (D,), its covariance (D, D), symmetric, and both finite.

    Raises:
      UserError: they are not; it names no file.
    """
    fits = mean.ndim == 1 and mean.size and cov.shape == (mean.size, mean.size)
    if not (fits and np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(
            f"mean {mean.shape} and covariance {cov.shape}: finite numbers (D,) and "
            "(D, D) expected"
        )
    if np.abs(cov - cov.T).max() > ROUNDING * np.abs(cov).max():
        raise UserError("the covariance is not symmetric")


def _factor(cov: np.ndarray) -> np.ndarray:
    """F (D, D) with F F^T = C, also where C has no full rank."""
    # 'evd' is the fastest; the default took several times as long where the rank was
    # not full.
    values, vectors = scipy.linalg.eigh(cov, driver="evd")
    if values[0] < -ROUNDING * values[-1]:
        raise UserError(
            f"a covariance has the negative eigenvalue {values[0]:.3g} (the largest "
            f"is {values[-1]:.3g}): it is not a covariance, make the statistics again"
        )
    return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 (FID's formula).

    With C1 = F F^T and C2 = G G^T the eigenvalues of C1 C2 are the squared singular
    values of F^T G, which are real where the product's own root may turn complex.

    Args:
      mean1, mean2: (D,).
      cov1, cov2: (D, D), of any rank.

    Raises:
      UserError: shapes that do not match, entries that are not finite, a matrix that
        is no covariance: asymmetric, or with negative eigenvalues beyond rounding.
    """
    mean1, cov1, mean2, cov2 = (
        np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2)
    )
    check_gaussian(mean1, cov1)
    check_gaussian(mean2, cov2)
    if mean1.shape != mean2.shape:
        raise UserError(
            f"one side has {mean1.size} features, the other {mean2.size}: compare "
            "statistics of one network"
        )
    roots = scipy.linalg.svdvals(_factor(cov1).T @ _factor(cov2))
    squared = np.sum((mean1 - mean2) ** 2)
    return float(squared + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum())


class InceptionScore:
    """Inception Score of class probabilities that come in batches, in float64.

    The mean over splits of exp(mean_i KL(p_i || mean_i p_i)). Splits are taken in the
    order of the images; the last may be shorter and counts like the others, as in
    `compute_inception_score` of openai/guided-diffusion's evaluator.

    Args:
      split: images in a split.
    """

    def __init__(self, split: int = 5000) -> None:
        self._split = split
        self._scores: list[float] = []
        self._restart()

    def _restart(self) -> None:
        self._seen, self._total, self._entropy = 0, np.zeros(()), 0.0

    def add(self, probabilities: np.ndarray) -> None:
        """Take the probabilities (n, K) of the next n images; 0 log 0 is 0."""
        probabilities = np.asarray(probabilities, np.float64)
        while len(probabilities):
            part = probabilities[: self._split - self._seen]
            probabilities = probabilities[len(part) :]
            self._seen += len(part)
            self._total = self._total + part.sum(axis=0)
            self._entropy += float(entr(part).sum())
            if self._seen == self._split:
                self._scores.append(self._score())
                self._restart()

    def _score(self) -> float:
        # The mean divergence is the entropy of the mean less the mean entropy.
        mixed = entr(self._total / self._seen).sum()
        return float(np.exp(mixed - self._entropy / self._seen))

    def value(self) -> float:
        """The score of the images so far, at least one."""
        scores = self._scores + ([self._score()] if self._seen else [])
        return float(np.mean(scores))
