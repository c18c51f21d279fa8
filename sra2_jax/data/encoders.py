"""The networks that encode images, run on all local devices batch by batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import patch_features
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.weights import load_dinov2


class Encoder(Protocol):
    """uint8 images (N, H, W, 3), split over the devices -> arrays (N, ...) on them.

    weights: SHA-256 of the parameters.
    """

    weights: str

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]: ...


@dataclass(frozen=True)
class Batch:
    """Encoded images: `arrays` by name, (N, ...) float32."""

    indices: Sequence[int]
    labels: Sequence[int]
    images: Sequence[np.ndarray]
    arrays: dict[str, np.ndarray]


def _mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("data",))


def _replicated(params: Any) -> Any:
    return jax.device_put(params, NamedSharding(_mesh(), PartitionSpec()))


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def rounded(batch_size: int) -> int:
    """The next multiple of the local devices.

    Raises:
      UserError: no images in a batch.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: give at least one image")
    return math.ceil(batch_size / jax.local_device_count()) * jax.local_device_count()


class VAEEncoder:
    """Mean and standard deviation of a VAE's posterior: "mean", "std"."""

    def __init__(self, module: AutoencoderKL, params: Any) -> None:
        self._params, self.weights = _replicated(params), _digest(params)

        @jax.jit
        def apply(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            x = pixels.astype(jnp.float32) / 127.5 - 1
            moments: Any = module.apply({"params": params}, x, method="encode")
            return dict(zip(("mean", "std"), moments, strict=True))

        self._apply = apply

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        return self._apply(self._params, pixels)


class WithFeatures:
    """What `encoder` gives and "features", (N, grid * grid, width) of a DINOv2.

    Raises:
      UserError: the DINOv2 cannot be loaded, or a grid that is no number of features.
    """

    def __init__(self, encoder: Encoder, model: str, grid: int, dtype: str) -> None:
        if grid < 1:
            raise UserError(f"--grid={grid}: give at least one feature on a side")
        module, params = load_dinov2(model)
        self.width = module.config.hidden_size
        self._encoder, self._params = encoder, _replicated(params)
        self.weights = f"{encoder.weights} {_digest(params)}"
        module = module.clone(dtype=jnp.dtype(dtype))
        self._apply = jax.jit(lambda p, pixels: patch_features(module, p, pixels, grid))

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        features = self._apply(self._params, pixels)
        return self._encoder(pixels) | {"features": features}


def encoded(
    rows: Iterable[tuple[int, np.ndarray, int]],
    encoder: Encoder,
    batch_size: int,
    shards: int = 1,
) -> Iterator[Batch]:
    """Encode (index, image, label) rows, one batch while another is read.

    Args:
      batch_size: is rounded up to a multiple of the local devices.
      shards: a batch has images of one index % shards only, in the order of the rows,
        so that it is the same whatever else is encoded.

    Raises:
      UserError: no images in a batch.
    """
    batch_size, mesh = rounded(batch_size), _mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    running: list[Any] = []
    for batch in _batched(rows, batch_size, shards):
        indices, images, labels = zip(*batch, strict=True)
        # One shape, one compilation: a last batch is filled up and cut again.
        filled = np.stack(images + (images[-1],) * (batch_size - len(batch)))
        arrays = encoder(jax.device_put(filled, split))
        running.append((indices, labels, images, arrays))
        if len(running) > 1:
            yield _fetch(*running.pop(0))
    for last in running:
        yield _fetch(*last)


def _batched(rows: Iterable[Any], size: int, shards: int) -> Iterator[list[Any]]:
    waiting: dict[int, list[Any]] = {}
    for row in rows:
        shard = row[0] % shards
        waiting.setdefault(shard, []).append(row)
        if len(waiting[shard]) == size:
            yield waiting.pop(shard)
    for shard in sorted(waiting):
        yield waiting[shard]


def _fetch(indices: Any, labels: Any, images: Any, arrays: Any) -> Batch:
    count = len(indices)
    fetched = {name: np.asarray(x)[:count] for name, x in arrays.items()}
    return Batch(indices, labels, images, fetched)
