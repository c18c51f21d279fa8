"""The kernel distance between two sets of features; KID, if they are Inception's."""

import numpy as np

from sra2_jax.errors import UserError


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
