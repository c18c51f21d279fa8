"""Encode images once into a dataset of latents: python -m sra2_jax.data.encode.

Images are decoded and cropped in threads while the devices run the encoder of the VAE
and this thread writes. The dataset appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sra2_jax
from sra2_jax.data import images as image_sources
from sra2_jax.data import records
from sra2_jax.errors import UserError, run_program
from sra2_jax.pretrained import load_vae

UNREADABLE = "unreadable.txt"
# Shards of 64 to 128 MB: large enough to stream well, small enough to move.
SHARD_BYTES = 128 * 2**20
# So that several readers have shards of their own (data.streams).
MIN_SHARDS = 8

# (N, H, W, 3) uint8 -> mean, std on the devices
Encoder = Callable[[np.ndarray], tuple[jax.Array, jax.Array]]


def encode(
    images: str | os.PathLike,
    out: str | os.PathLike,
    vae: str,
    resolution: int,
    *,
    split: str = "train",
    shards: int | None = None,
    batch_size: int = 64,
    max_bad: float = 0.01,
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> records.LatentsInfo:
    """Encode every image of a source into a new dataset of latents.

    Args:
      images: source, see `images.open_source`.
      out: local folder to make; may exist only if empty.
      vae: folder or hub id, see `pretrained.load_vae`.
      resolution: side of the centre crop in pixels.
      split: split to read of the source, and name of the split written.
      shards: number of files; None: from the size.
      batch_size: images per call, over the local devices (rounded up to a multiple).
      max_bad: share of images that may be unreadable; `unreadable.txt` lists them.
      dtype: compute dtype of the VAE, float32 or bfloat16.
      progress: called with the images done and in all, after each batch.

    Raises:
      UserError: no images, too many unreadable, `out` not empty, a resolution or
        number of shards that does not fit, latents not finite in float16.
    """
    out = _vacant(out)
    source = image_sources.open_source(images, split)
    module, params = load_vae(vae)
    shape = _latent_shape(module.config, resolution, vae)
    shards = _choose_shards(shards, source.length, shape)
    encoder, batch_size = _make_encoder(module.clone(dtype=dtype), params, batch_size)
    good = _Readable(source, resolution, max_bad, images)
    statistics = _Statistics()
    with _appears_when_done(out) as folder:
        with records.ShardWriter(folder, split, shards) as writer:
            for batch in _encoded(good, encoder, batch_size):
                _write(writer, statistics, batch, vae)
                progress(good.seen, source.length)
        good.report(folder)
        info = records.LatentsInfo(
            vae=vae,
            resolution=resolution,
            latent_shape=shape,
            num_examples=good.count,
            num_classes=source.num_classes,
            class_names=source.class_names,
            splits={split: writer.shards()},
            crop=records.CROP,
            versions=_versions(),
            **statistics.sampled(module.config),
        )
        records.write_tfds_metadata(folder, info)
        info.write(folder)
    return info


def _latent_shape(config: Any, resolution: int, vae: str) -> tuple[int, int, int]:
    if resolution < 1 or resolution % config.downsample:
        raise UserError(
            f"resolution {resolution} is not a multiple of {config.downsample}, the "
            f"downsampling of {vae}; change --resolution"
        )
    side = resolution // config.downsample
    return side, side, config.latent_channels


def _vacant(out: str | os.PathLike) -> Path:
    if "://" in os.fspath(out):
        raise UserError(f"{out}: encode into a local folder, then copy it there")
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"{path}: exists and is not an empty folder; nothing is overwritten, "
            "choose another --out or remove it"
        )
    return path


def _choose_shards(shards: int | None, length: int, shape: tuple[int, int, int]) -> int:
    """The number asked for, else a power of two, so that readers share them evenly."""
    if shards is None:
        wanted = max(MIN_SHARDS, length * 4 * math.prod(shape) / SHARD_BYTES)
        return min(length, 2 ** math.ceil(math.log2(wanted)))
    if not 1 <= shards <= length:
        raise UserError(
            f"--shards={shards} for {length} images; use a number from 1 to {length}"
        )
    return shards


def _make_encoder(module: Any, params: Any, batch_size: int) -> tuple[Encoder, int]:
    """The jitted encoder, sharded over the local devices, and the batch it takes."""
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size}: give at least one image")
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def apply(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = pixels.astype(jnp.float32) / 127.5 - 1
        return module.apply({"params": params}, x, method="encode")

    def encoder(pixels: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return apply(params, jax.device_put(pixels, rows))

    return encoder, math.ceil(batch_size / len(devices)) * len(devices)


class _Readable:
    """Iterates over the images that decode, and keeps account of the others."""

    def __init__(
        self, source: Any, resolution: int, max_bad: float, name: str | os.PathLike
    ) -> None:
        self._source, self._resolution = source, resolution
        self._name, self._max_bad = name, max_bad
        self.count = self.seen = 0
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, int]]:
        images = image_sources.read(self._source, self._resolution)
        for index, name, image, label in images:
            self.seen += 1
            if not 0 <= label < self._source.num_classes:
                raise UserError(
                    f"{self._name}: {name} has no valid label ({label}); choose a "
                    f"split with labels in [0, {self._source.num_classes})"
                )
            if isinstance(image, Exception):
                self.unreadable.append(f"{name}\t{_one_line(image)}")
                self._check()
            else:
                self.count += 1
                yield index, image, label

    def report(self, folder: Path) -> None:
        """Name the unreadable images in a file; refuse if there were no others."""
        if not self.count:
            raise UserError(f"{self._name}: none of its images can be decoded")
        if self.unreadable:
            text = "".join(f"{line}\n" for line in self.unreadable)
            (folder / UNREADABLE).write_text(text, encoding="utf-8")

    def _check(self) -> None:
        # At once, not at the end: the rest of a large source would be encoded in vain.
        if len(self.unreadable) > self._max_bad * self._source.length:
            first = self.unreadable[0].replace("\t", ": ")
            raise UserError(
                f"{self._name}: {len(self.unreadable)} of the first {self.seen} images "
                f"cannot be decoded, more than --max_bad={self._max_bad} of all "
                f"{self._source.length} ({first}); mend them or raise --max_bad"
            )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


Encoded = tuple[Sequence[int], Sequence[int], np.ndarray, np.ndarray]


def _encoded(good: _Readable, encoder: Encoder, batch_size: int) -> Iterator[Encoded]:
    """Indices, labels, mean, std, batch by batch; one batch runs while one is read."""
    rows = iter(good)
    running: list[Any] = []
    while batch := list(itertools.islice(rows, batch_size)):
        indices, pixels, labels = zip(*batch, strict=True)
        # One shape, one compilation: the last batch is filled up and cut again.
        filled = np.stack(pixels + (pixels[-1],) * (batch_size - len(batch)))
        running.append((indices, labels, encoder(filled)))
        if len(running) > 1:
            yield _fetch(*running.pop(0))
    for last in running:
        yield _fetch(*last)


def _fetch(
    indices: Sequence[int], labels: Sequence[int], latents: tuple[Any, Any]
) -> Encoded:
    mean, std = (np.asarray(x)[: len(indices)] for x in latents)
    return indices, labels, mean, std


class _Statistics:
    """Sums over all latents of a dataset, per channel, in float64."""

    def __init__(self) -> None:
        self._count, self._mean, self._square = 0, 0.0, 0.0

    def add(self, mean: np.ndarray, std: np.ndarray) -> None:
        mean, std = mean.astype(np.float64), std.astype(np.float64)
        self._count += mean[..., 0].size
        self._mean += mean.sum((0, 1, 2))
        self._square += (mean**2 + std**2).sum((0, 1, 2))

    def sampled(self, config: Any) -> dict[str, Any]:
        """Fields of LatentsInfo: the scaling of the VAE and, exactly instead of drawn,
        mean and std of z = (mean + std * N(0, 1) - shift) * scale, per channel:
        E[z] from E[mean], E[z^2] from E[mean^2 + std^2]."""
        mean = self._mean / self._count
        std = np.sqrt(np.maximum(self._square / self._count - mean**2, 0.0))
        scale, shift = config.scaling_factor, config.shift_factor
        return {
            "scaling_factor": scale,
            "shift_factor": shift,
            "latent_mean": tuple((mean - shift) * scale),
            "latent_std": tuple(std * abs(scale)),
        }


def _write(
    writer: records.ShardWriter, statistics: _Statistics, batch: Encoded, vae: str
) -> None:
    indices, labels, mean, std = batch
    with np.errstate(over="ignore"):
        halves = mean.astype(np.float16), std.astype(np.float16)
    finite = np.isfinite(halves[0]) & np.isfinite(halves[1])
    wrong = np.flatnonzero(~finite.all((1, 2, 3)))
    if wrong.size:
        raise UserError(
            f"{vae}: the latent of image {indices[wrong[0]]} is not finite or too "
            "large for float16; use --dtype=float32, or check the VAE's weights"
        )
    statistics.add(mean, std)
    for row, (index, label) in enumerate(zip(indices, labels, strict=True)):
        writer.write(halves[0][row], halves[1][row], label, index)


@contextlib.contextmanager
def _appears_when_done(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that gets its name at the end, or is removed."""
    folder = out.absolute().parent / f".{out.name}.incomplete-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if _vacant(out).exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "tensorflow-datasets", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    tensorflow = records.tensorflow().__version__
    return {"sra2_jax": sra2_jax.__version__, "tensorflow": tensorflow, **found}


class _Meter:
    """Prints the rate and the time left, at most every 10 seconds."""

    def __init__(self) -> None:
        self._start = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed >= 10:
            self._printed = now
            rate = done / (now - self._start)
            left = (total - done) / rate / 60
            text = f"{done:,} of {total:,} images, {rate:.0f}/s, {left:.0f} min left"
            print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sra2_jax.data.encode", description=__doc__.partition("\n\n")[0]
    )
    add = parser.add_argument
    source = "folder with one sub-folder per class, tfds:NAME[:SPLIT], or digits"
    add("--images", required=True, metavar="SOURCE", help=source)
    add("--out", required=True, metavar="DIR", help="local folder to make")
    add("--vae", required=True, metavar="VAE", help="diffusers folder or hub id")
    add("--resolution", type=int, default=256, help="pixels (%(default)s)")
    add("--split", default="train", help="split to read and write (%(default)s)")
    add("--shards", type=int, help="number of files (by default from the size)")
    add("--batch_size", type=int, default=64, help="images per call (%(default)s)")
    bad = "share of unreadable images to leave out and list (%(default)s)"
    add("--max_bad", type=float, default=0.01, help=bad)
    dtypes = ("float32", "bfloat16")
    kind = "compute type of the VAE (%(default)s)"
    add("--dtype", choices=dtypes, default=dtypes[0], help=kind)
    return parser.parse_args()


def main() -> None:
    """Encode as the flags say and print what was done."""
    start = time.monotonic()
    info = encode(**vars(_arguments()), progress=_Meter())
    seconds = time.monotonic() - start
    size = sum(sum(shards.bytes) for shards in info.splits.values())
    print(
        f"{info.num_examples:,} images, {seconds:.1f} s, "
        f"{info.num_examples / seconds:.1f} images/s, {size:,} bytes"
    )


if __name__ == "__main__":
    run_program(main)
