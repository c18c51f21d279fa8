"""Distances between sets of features."""

import numpy as np
import scipy.linalg


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64 (FID's formula).

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of S C2 S, S = C1^(1/2):
    symmetric, so it is real where the product's own root may turn complex.
    """
    values, vectors = scipy.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = scipy.linalg.eigvalsh(root @ cov2 @ root)
    trace_root = np.sqrt(np.maximum(cross, 0)).sum()
    squared = np.sum((mean1 - mean2) ** 2)
    return float(squared + np.trace(cov1) + np.trace(cov2) - 2 * trace_root)
