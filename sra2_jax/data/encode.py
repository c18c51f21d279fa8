"""Encode images once into a dataset of latents: python -m sra2_jax encode.

Images are decoded and cropped in threads while the devices run the encoder of the VAE
and this thread writes. The dataset appears under its name only when it is complete;
killed, the same command goes on with the shards that are left.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra2_jax.command import Parser
from sra2_jax.data import images as image_sources
from sra2_jax.data import records
from sra2_jax.data.build import Build
from sra2_jax.data.check import run_check
from sra2_jax.data.options import Options, option
from sra2_jax.data.pixels import to_png
from sra2_jax.data.writer import ShardWriter
from sra2_jax.errors import UserError
from sra2_jax.models.dinov2 import DINOv2, patch_features
from sra2_jax.models.vae import AutoencoderKL
from sra2_jax.weights import load_dinov2, load_vae

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class EncodeOptions(Options):
    """What a dataset of latents is encoded with."""

    images: str = option("", image_sources.SPECS)
    store_images: bool = option(
        False, "keep the cropped images too, as PNG, for methods that need them"
    )
    encoder: str = option(
        "", "store the patch features of this DINOv2: folder, hub id or built-in name"
    )
    grid: int = option(
        0, "features on a side; by default half the latent's, as for patches of 2"
    )
    batch_size: int = option(
        64, "images per call, over the local devices (rounded up to a multiple)"
    )
    max_bad: float = option(0.01, "share of unreadable images to leave out and list")
    dtype: str = option(DTYPES[0], "compute type of the networks", choices=DTYPES)
    mirror: bool = option(
        False, "also a record of each image mirrored: an epoch is twice as long"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size}: give at least one image")
        if self.grid < 0 or (self.grid and not self.encoder):
            raise UserError(
                f"--grid={self.grid}: give at least one feature on a side, of an "
                "--encoder=MODEL"
            )


def encode(
    options: EncodeOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> records.LatentsInfo | None:
    """Encode every image of a source into a new dataset of latents.

    Begins where an earlier call with the same options was interrupted. The result is
    the same, byte for byte, on the same kind of device.

    Args:
      progress: called with this process's images, done and in all, after each batch.

    Returns:
      The description of the dataset, None while other processes have shards to write.

    Raises:
      UserError: no images, too many unreadable, something else in `out`, other options
        than the work began with, a resolution or number of shards that does not fit,
        numbers not finite in float16.
    """
    source = image_sources.open_source(options.images, options.split)
    encoder = Encoder.load(options)
    shape, features = options.latent_shape(encoder.vae.config), encoder.features
    # A PNG as two bytes a pixel.
    size = 4 * math.prod(shape) + 2 * options.store_images * options.resolution**2
    size += 2 * features.grid**2 * features.width if features else 0
    shards = options.choose_shards(source.length, (1 + options.mirror) * size)
    made_with = {
        "images": options.images,
        "listing": source.fingerprint,
        "split": options.split,
        "vae": options.vae,
        "weights": encoder.weights,
        "resolution": options.resolution,
        "store_images": options.store_images,
        "encoder": options.encoder,
        "grid": features.grid if features else 0,
        "shards": shards,
        "batch_size": rounded(options.batch_size),
        "dtype": options.dtype,
        "mirror": options.mirror,
    }
    # The mirrored image's record is in the same shard.
    mirror_offset = options.mirror * math.ceil(source.length / shards) * shards

    def images(own: Iterable[int]) -> int:
        return sum(len(range(s, source.length, shards)) for s in own)

    with Build(options, shards, made_with) as build:
        groups, total = list(build.left(source.at_once)), images(build.own)
        done = total - images(itertools.chain(*groups))
        for group in groups:
            with build.writing(group) as writer, ThreadPoolExecutor(16) as pool:
                rows = image_sources.readable(
                    source,
                    options.resolution,
                    options.max_bad,
                    writer.skip,
                    stride=shards,
                    offsets=group,
                    mirror_offset=mirror_offset,
                )
                for batch in encoded(rows, encoder, options.batch_size, shards):
                    _write(writer, batch, pool if options.store_images else None)
                    done += sum(index < source.length for index in batch.indices)
                    progress(done, total)
        return build.finish(
            vae=options.vae,
            resolution=options.resolution,
            latent_shape=shape,
            num_classes=source.num_classes,
            class_names=source.class_names,
            crop=records.CROP,
            images=options.store_images,
            features=features,
            mirror_offset=mirror_offset,
            scaling_factor=encoder.vae.config.scaling_factor,
            shift_factor=encoder.vae.config.shift_factor,
        )


@dataclass(frozen=True)
class Batch:
    """Encoded images: `arrays` by name, (N, ...) float32."""

    indices: Sequence[int]
    labels: Sequence[int]
    images: Sequence[np.ndarray]
    arrays: dict[str, np.ndarray]


def _write(writer: ShardWriter, batch: Batch, pool: Executor | None) -> None:
    """Write a batch, and its images as PNG, made in a pool, where one is given."""
    pngs: Iterable[bytes | None] = itertools.repeat(None)
    if pool is not None:
        pngs = pool.map(to_png, batch.images)
    rows = zip(batch.indices, batch.labels, pngs, strict=False)
    for row, (index, label, image) in enumerate(rows):
        arrays = {name: x[row] for name, x in batch.arrays.items()}
        writer.write(label, index, image, **arrays)


class Encoder:
    """uint8 images (N, H, W, 3), split over the devices -> arrays (N, ...) on them:
    "mean" and "std" of a VAE's posterior and, with a DINOv2, "features".

    Attributes:
      vae: the VAE.
      features: what the DINOv2 gives, None without.
      weights: SHA-256 of the parameters of each.
    """

    def __init__(self, vae: AutoencoderKL, params: Any) -> None:
        self.vae, self.weights = vae, _digest(params)
        self.features: records.Features | None = None

        @jax.jit
        def moments(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            x = pixels.astype(jnp.float32) / 127.5 - 1
            both: Any = vae.apply({"params": params}, x, method="encode")
            return dict(zip(("mean", "std"), both, strict=True))

        self._networks: list[Any] = [(moments, _replicated(params))]

    @classmethod
    def load(cls, options: EncodeOptions) -> Encoder:
        """The networks that the options name."""
        vae, params = load_vae(options.vae)
        side, _, _ = options.latent_shape(vae.config)
        encoder = cls(vae.clone(dtype=options.dtype), params)
        if options.encoder:
            dinov2, params = load_dinov2(options.encoder)
            width, grid = dinov2.config.hidden_size, options.grid or max(side // 2, 1)
            encoder.features = records.Features(options.encoder, grid, width)
            encoder.weights += f" {_digest(params)}"
            encoder._add(dinov2.clone(dtype=jnp.dtype(options.dtype)), params, grid)
        return encoder

    def _add(self, dinov2: DINOv2, params: Any, grid: int) -> None:
        @jax.jit
        def features(params: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            return {"features": patch_features(dinov2, params, pixels, grid)}

        self._networks.append((features, _replicated(params)))

    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for network, params in self._networks:
            found |= network(params, pixels)
        return found


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
    """The next multiple of the local devices."""
    return math.ceil(batch_size / jax.local_device_count()) * jax.local_device_count()


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
    """
    batch_size = rounded(batch_size)
    split = NamedSharding(_mesh(), PartitionSpec("data"))
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


class _Meter:
    """Prints the rate and the time left, at most every 10 seconds."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        # What an earlier run has done is not this one's speed.
        began, first = self._first = self._first or (now, done)
        if now - self._printed >= 10 and done > first:
            self._printed = now
            rate = (done - first) / (now - began)
            left = (total - done) / rate / 60
            text = f"{done:,} of {total:,} images, {rate:.0f}/s, {left:.0f} min left"
            print(text, file=sys.stderr, flush=True)


def main() -> int | None:
    """Encode as the flags say and print what was done, or check a dataset."""
    parser = Parser(prog="sra2 encode", description=__doc__.partition("\n\n")[0])
    EncodeOptions.add_flags(parser)
    parser.add_argument(
        "--check",
        metavar="DIR",
        help="read a dataset and name its damaged shards, instead of encoding",
    )
    start, flags = time.monotonic(), vars(parser.parse_args())
    if folder := flags.pop("check"):
        return run_check(folder)
    if missing := [f"--{n}" for n in ("images", "out", "vae") if not flags[n]]:
        parser.error(f"{' and '.join(missing)} must be given")
    info = encode(EncodeOptions(**flags), _Meter())
    seconds = time.monotonic() - start
    if info is None:
        print(
            f"{seconds:.1f} s, all shards of this process are written; the dataset "
            "appears when the others are"
        )
        return None
    size = sum(sum(shards.bytes) for shards in info.splits.values())
    print(
        f"{info.num_examples:,} images, {seconds:.1f} s, "
        f"{info.num_examples / seconds:.1f} images/s, {size:,} bytes"
    )
    return None
