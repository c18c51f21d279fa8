"""Precision and recall of a set of features by nearest neighbours, block by block."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sra2_jax.errors import UserError


def _squared_distances(rows: Array, columns: Array) -> Array:
    """(n, D), (m, D) -> (n, m), at least 0."""
    norms = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)
    # Accelerators would otherwise round the features to bf16 or TF32.
    squared = norms - 2 * jnp.matmul(rows, columns.T, precision="highest")
    return jnp.maximum(squared, 0)


@jax.jit
def _nearer(
    nearest: Array, rows: Array, columns: Array, row0: Array, column0: Array, end: Array
) -> Array:
    """The k smallest squared distances (n, k) so far, with those to `columns`.

    row0, column0: indices of the first row and column in their common set; columns
    from index `end` on are filling.
    """
    row = row0 + jnp.arange(len(rows))[:, None]
    column = column0 + jnp.arange(len(columns))
    # The own point goes by its index: its computed distance need not be the smallest.
    other = (column != row) & (column < end)
    squared = jnp.where(other, _squared_distances(rows, columns), jnp.inf)
    both = jnp.concatenate([nearest, squared], axis=1)
    return -jax.lax.top_k(-both, nearest.shape[1])[0]


@jax.jit
def _covered(
    rows: Array, row_radii: Array, columns: Array, column_radii: Array
) -> tuple[Array, Array]:
    """Which rows (n,) lie in a ball around a column, which columns (m,) in one of
    a row; radii are squared."""
    squared = _squared_distances(rows, columns)
    return (
        (squared <= column_radii).any(axis=1),
        (squared <= row_radii[:, None]).any(axis=0),
    )


class _Blocks:
    """A set of points in blocks of one shape, centred, on the default device."""

    def __init__(self, points: np.ndarray, mean: np.ndarray, size: int) -> None:
        self._points, self._mean, self._size = points, mean, size

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        """First index and points (size, D); the last block is filled up with zeros."""
        for start in range(0, len(self._points), self._size):
            part = self._points[start : start + self._size]
            block = np.zeros((self._size, part.shape[1]), np.float32)
            np.subtract(part, self._mean, out=block[: len(part)], casting="same_kind")
            yield start, jnp.asarray(block)

    def squared_radii(self, k: int) -> list[Array]:
        """Squared distances to the k-th nearest other point (size,), a block each;
        those of the filling are negative, so that their balls hold nothing."""
        count, radii = len(self._points), []
        for row0, rows in self:
            nearest = jnp.full((self._size, k), jnp.inf)
            for column0, columns in self:
                nearest = _nearer(nearest, rows, columns, row0, column0, count)
                # Else blocks would queue up faster than they are worked through.
                nearest.block_until_ready()
            real = row0 + np.arange(self._size) < count
            radii.append(jnp.where(real, nearest[:, -1], -1))
        return radii


def _check(name: str, points: np.ndarray, k: int) -> None:
    if len(points) <= k:
        raise UserError(
            f"{name}: {len(points)} images are too few for {k} nearest neighbours "
            f"each: give at least {k + 1}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        # A sum needs no memory, a mask of the size of the points does.
        finite = np.isfinite(points.sum(dtype=np.float64))
    if not finite:
        raise UserError(f"{name}: has features that are not finite: check its images")


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, block: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall, as ADM takes them.

    Around every point lies a ball that reaches to its k-th nearest neighbour in its own
    set, itself left out. Precision is the share of samples in a ball of the reference,
    recall the share of the reference in a ball of the samples.

    Distances are float32 on the default device. Besides the two arrays it takes about
    4 (4 B D + 6 B^2) bytes, B = block, whatever N and M are: 0.17 GB for D = 2048. With
    10,000 and 50,000 images, 0.49 GB of features, a process was measured to grow by
    0.39 GB, JAX's own start and compiler among it.

    Args:
      reference: (N, D).
      samples: (M, D).
      block: points at a time.

    Returns:
      precision, recall in [0, 1].

    Raises:
      UserError: k points or fewer in a set, another D, features that are not finite.

    Source: Kynkäänniemi et al. 2019, `compute_prec_recall` of openai/guided-diffusion's
    evaluator, which rounds distances to float16.
    """
    _check("reference", reference, k)
    _check("samples", samples, k)
    if reference.shape[1] != samples.shape[1]:
        raise UserError(
            f"reference has {reference.shape[1]} features, samples "
            f"{samples.shape[1]}: use one network for both"
        )
    size = min(block, max(len(reference), len(samples)))
    # Distances stay; squared norms, and with them the rounding, shrink.
    mean = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    real, fake = (_Blocks(points, mean, size) for points in (reference, samples))
    real_radii, fake_radii = real.squared_radii(k), fake.squared_radii(k)
    recalled = [np.zeros(size, bool) for _ in real_radii]
    precise = [np.zeros(size, bool) for _ in fake_radii]
    for i, (_, rows) in enumerate(real):
        for j, (_, columns) in enumerate(fake):
            hits = _covered(rows, real_radii[i], columns, fake_radii[j])
            recalled[i] |= np.asarray(hits[0])
            precise[j] |= np.asarray(hits[1])
    # Filling at the origin may lie in a ball: it is left out here.
    precision = np.concatenate(precise)[: len(samples)].mean()
    recall = np.concatenate(recalled)[: len(reference)].mean()
    return float(precision), float(recall)
