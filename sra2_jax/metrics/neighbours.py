"""Precision and recall of a set of features by nearest neighbours."""

from typing import Any

import numpy as np
from sklearn.metrics import pairwise_distances_chunked

from sra2_jax.errors import UserError

MEMORY = 256  # MiB of distances at a time


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
