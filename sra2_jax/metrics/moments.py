"""FID's distance, Inception Score, kernel distance, precision and recall, and the
statistics they need."""

from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg.blas import dsyrk
from scipy.special import entr

from sra2_jax.errors import UserError

Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)
# float32 features of one picture may differ in their last bits: their variance is
# then this share of their mean square, at most.
SAME = 1e-13
# Rounding to float32 leaves a covariance asymmetries and negative eigenvalues that are
# smaller than this share of its largest entry or eigenvalue.
ROUNDING = 1e-5
MEMORY = 256  # MiB of distances at a time


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


class Moments:
    """Mean and unbiased covariance of features that come in batches, in float64.

    Sums are of differences from the first batch's mean, so features far from zero lose
    nothing. Memory: one matrix of D x D.

    source: name of the images, for messages; count: of the images so far.
    """

    def __init__(self, source: str) -> None:
        self.count = 0
        self._source = source

    def add(self, features: np.ndarray) -> None:
        """Take the features (n, D) of the next n images, n >= 1."""
        features = np.asarray(features, np.float64)
        if not self.count:
            width = features.shape[1]
            self._origin, self._sum = features.mean(axis=0), np.zeros(width)
            self._products = np.zeros((width, width), order="F")
        self.count += len(features)
        features = features - self._origin
        self._sum += features.sum(axis=0)
        # The upper triangle, in place: four times as fast as += features.T @ features.
        self._products = dsyrk(1, features.T, 1, self._products, overwrite_c=True)

    @property
    def mean(self) -> np.ndarray:
        """(D,)"""
        return self._origin + self._sum / self.count

    def cov(self) -> np.ndarray:
        """(D, D), the sum of products over count - 1. UserError where it is none."""
        products = np.triu(self._products) + np.triu(self._products, 1).T
        scatter = products - np.outer(self._sum, self._sum / self.count)
        cov = scatter / max(self.count - 1, 1)
        if not np.trace(cov) > SAME * np.sum(self.mean**2):  # also where it is NaN
            raise UserError(
                f"{self._source}: {self.count} images, all with the same features or "
                "some that are not finite, have no covariance: give different pictures"
            )
        return cov


def check_gaussian(mean: np.ndarray, cov: np.ndarray) -> None:
    """See that a mean is (D,), its covariance (D, D), symmetric, and both finite.

    Raises ValueError: they are not.
    """
    fits = mean.ndim == 1 and mean.size and cov.shape == (mean.size, mean.size)
    finite = fits and np.isfinite(mean).all() and np.isfinite(cov).all()
    if not finite or np.abs(cov - cov.T).max() > ROUNDING * np.abs(cov).max():
        raise ValueError(
            f"mean {mean.shape} and covariance {cov.shape}: finite numbers (D,) and "
            "(D, D), symmetric, expected"
        )


def _factor(cov: np.ndarray) -> np.ndarray:
    """F (D, D) with F F^T = C, also where C has no full rank."""
    # 'evd' is the fastest; the default took several times as long where the rank was
    # not full.
    values, vectors = scipy.linalg.eigh(cov, driver="evd")
    if values[0] < -ROUNDING * values[-1]:
        raise UserError(
            f"a covariance has the negative eigenvalue {values[0]:.3g}: make the "
            "statistics again"
        )
    return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 (FID's formula).

    With C1 = F F^T and C2 = G G^T the eigenvalues of C1 C2 are the squared singular
    values of F^T G, which are real where the product's own root may turn complex.

    mean1, mean2: (D,). cov1, cov2: (D, D), of any rank.

    Raises UserError: two numbers of features, or a matrix that is no covariance.
    """
    if np.shape(mean1) != np.shape(mean2):
        raise UserError(
            f"one side has {np.size(mean1)} features, the other {np.size(mean2)}: "
            "compare statistics of one network"
        )
    roots = scipy.linalg.svdvals(_factor(cov1).T @ _factor(cov2))
    squared = np.sum((mean1 - mean2) ** 2)
    return float(squared + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum())


class InceptionScore:
    """Inception Score of class probabilities that come in batches, in float64.

    The mean over splits, of so many images in their order, of
    exp(mean_i KL(p_i || mean_i p_i)). The last may be shorter and counts like the
    others, as in `compute_inception_score` of openai/guided-diffusion's evaluator.
    """

    def __init__(self, split: int = 5000) -> None:
        self._split, self._seen = split, 0
        # of each split the sum of probabilities (K,), then of entropies, then the count
        self._sums: dict[int, np.ndarray] = {}

    def add(self, probabilities: np.ndarray) -> None:
        """Take the probabilities (n, K) of the next n images; 0 log 0 is 0."""
        probabilities = np.asarray(probabilities, np.float64)
        splits = (self._seen + np.arange(len(probabilities))) // self._split
        self._seen += len(probabilities)
        for split in np.unique(splits).tolist():
            part = probabilities[splits == split]
            sums = np.append(part.sum(axis=0), [entr(part).sum(), len(part)])
            self._sums[split] = self._sums.get(split, np.zeros(len(sums))) + sums

    def value(self) -> float:
        """The score of the images so far, at least one."""
        # The mean divergence is the entropy of the mean less the mean entropy.
        means = [sums[:-1] / sums[-1] for sums in self._sums.values()]
        return float(np.mean([np.exp(entr(m[:-1]).sum() - m[-1]) for m in means]))


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, block: int = 1000
) -> float:
    """The unbiased squared maximum mean discrepancy of k(x, y) = (x.y / D + 1)^3.

    The mean over blocks of at most `block` features of either set, (N, D) and (M, D),
    drawn without replacement in a fixed order; about 0 for sets of one distribution,
    below it by chance. Unlike Fréchet distances it does not fall with the sets' size.

    Raises UserError: a set with fewer than two.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401), eq. 4, and its kernel; torch's
    codes draw 100 blocks of 1,000 with replacement.
    """
    least = min(len(reference), len(samples))
    if least < 2:
        raise UserError("the kernel distance needs at least 2 images in each set")
    size = min(block, least)
    draw = np.random.default_rng(0)
    orders = [draw.permutation(len(x)) for x in (reference, samples)]
    values = []
    for start in range(0, least - size + 1, size):
        x, y = (
            features[order[start : start + size]].astype(np.float64)
            for features, order in zip((reference, samples), orders, strict=True)
        )
        within = [(kernel.sum() - np.trace(kernel)) for kernel in (_k(x, x), _k(y, y))]
        pairs = size * (size - 1)
        values.append(sum(within) / pairs - 2 * _k(x, y).mean())
    return float(np.mean(values))


def _k(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall, as ADM takes them.

    Around every point lies a ball that reaches to its k-th nearest neighbour in its own
    set, itself left out. Precision is the share of samples in a ball of the reference,
    recall the share of the reference in a ball of the samples.

    Takes (N, D) and (M, D), returns both in [0, 1].

    Raises UserError: k points or fewer in a set.

    Source: Kynkäänniemi et al. 2019, `compute_prec_recall` of openai/guided-diffusion's
    evaluator, which rounds distances to float16.
    """
    from sklearn.metrics import pairwise_distances_chunked  # takes seconds

    if min(len(reference), len(samples)) <= k:
        raise UserError(f"precision and recall need more than {k} images in each set")

    def radii(points: np.ndarray) -> np.ndarray:
        # The nearest is the point itself.
        farthest = lambda distances, _: np.partition(distances, k)[:, k]  # noqa: E731
        how: Any = {"reduce_func": farthest, "working_memory": MEMORY}
        return np.concatenate([*pairwise_distances_chunked(points, **how)])

    real, fake = radii(reference), radii(samples)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(0, bool)
    for rows in pairwise_distances_chunked(reference, samples, working_memory=MEMORY):
        own = real[len(recalled) :][: len(rows)]
        precise |= (rows <= own[:, None]).any(axis=0)
        recalled = np.append(recalled, (rows <= fake).any(axis=1))
    return float(precise.mean()), float(recalled.mean())
