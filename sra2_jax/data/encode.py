"""Encode images once into a dataset of latents: python -m sra2_jax.data.encode.

Images are decoded and cropped in threads while the devices run the encoder of the VAE
and this thread writes. The dataset appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

import sra2_jax
from sra2_jax.data import images as image_sources
from sra2_jax.data import records
from sra2_jax.data.encoders import Batch, Encoder, VAEEncoder, WithFeatures, encoded
from sra2_jax.data.images import Readable
from sra2_jax.data.tfds_metadata import write_tfds_metadata
from sra2_jax.errors import UserError, run_program
from sra2_jax.models.vae import VAEConfig
from sra2_jax.pretrained import load_vae

# Shards of 64 to 128 MB: large enough to stream well, small enough to move.
SHARD_BYTES = 128 * 2**20
# So that several readers have shards of their own (data.streams).
MIN_SHARDS = 8


def encode(
    images: str | os.PathLike,
    out: str | os.PathLike,
    vae: str,
    resolution: int,
    *,
    split: str = "train",
    store_images: bool = False,
    encoder: str = "",
    grid: int = 0,
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
      store_images: keep the crops beside their latents, losslessly (PNG).
      encoder: store its patch features, see `pretrained.load_dinov2`; "": none.
      grid: features on a side, 0: half the latent's side, as patches of 2 have it.
      shards: number of files; None: from the size.
      batch_size: images per call, over the local devices (rounded up to a multiple).
      max_bad: share of images that may be unreadable; `unreadable.txt` lists them.
      dtype: compute dtype of the networks, float32 or bfloat16.
      progress: called with the images done and in all, after each batch.

    Raises:
      UserError: no images, too many unreadable, `out` not empty, a resolution or
        number of shards that does not fit, numbers not finite in float16.
    """
    out = _vacant(out)
    source = image_sources.open_source(images, split)
    config, run, shape, features = _networks(vae, resolution, encoder, grid, dtype)
    size = _record_size(shape, resolution if store_images else 0, features)
    shards = _choose_shards(shards, source.length, size)
    good = Readable(source, resolution, max_bad, images)
    statistics = _Statistics()
    models = {"mean": vae, "std": vae, "features": encoder}
    with _appears_when_done(out) as folder:
        with (
            records.ShardWriter(folder, split, shards) as writer,
            _PNGs(store_images) as pngs,
        ):
            for batch in encoded(good, run, batch_size):
                _write(writer, statistics, batch, pngs, models)
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
            images=store_images,
            features=features,
            **statistics.sampled(config),
        )
        write_tfds_metadata(folder, info)
        info.write(folder)
    return info


def _networks(
    vae: str, resolution: int, encoder: str, grid: int, dtype: str
) -> tuple[VAEConfig, Encoder, tuple[int, int, int], records.Features | None]:
    """The VAE's config, what runs on a batch, a latent's shape, the features."""
    module, params = load_vae(vae)
    shape = _latent_shape(module.config, resolution, vae)
    run = VAEEncoder(module.clone(dtype=dtype), params)
    if not encoder:
        if grid:
            raise UserError(f"--grid={grid} is of features: give --encoder=MODEL too")
        return module.config, run, shape, None
    grid = grid or max(shape[0] // 2, 1)
    both = WithFeatures(run, encoder, grid, dtype)
    features = records.Features(encoder, grid, both.width)
    return module.config, both, shape, features


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


def _record_size(
    shape: tuple[int, int, int], pixels: int, features: records.Features | None
) -> int:
    """Bytes of a record, about; a PNG as two for a pixel."""
    stored = features.grid**2 * features.width if features else 0
    return 4 * math.prod(shape) + 2 * pixels**2 + 2 * stored


def _choose_shards(shards: int | None, length: int, size: int) -> int:
    """The number asked for, else a power of two, so that readers share them evenly.

    size: bytes of a record, about.
    """
    if shards is None:
        wanted = max(MIN_SHARDS, length * size / SHARD_BYTES)
        return min(length, 2 ** math.ceil(math.log2(wanted)))
    if not 1 <= shards <= length:
        raise UserError(
            f"--shards={shards} for {length} images; use a number from 1 to {length}"
        )
    return shards


class _Statistics:
    """Sums over all latents of a dataset, per channel, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Any = 0.0
        self._square: Any = 0.0

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


class _PNGs:
    """Context manager that compresses images in threads, or gives None for each."""

    def __init__(self, on: bool) -> None:
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1)) if on else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def __call__(self, images: Sequence[np.ndarray]) -> Iterable[bytes | None]:
        if not self._pool:
            return [None] * len(images)
        return self._pool.map(image_sources.to_png, images)


def _write(
    writer: records.ShardWriter,
    statistics: _Statistics,
    batch: Batch,
    pngs: _PNGs,
    models: Mapping[str, str],
) -> None:
    """Write a batch; `models` names the network that each array comes from."""
    with np.errstate(over="ignore"):
        halves = {name: x.astype(np.float16) for name, x in batch.arrays.items()}
    for name, values in halves.items():
        wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
        if wrong.size:
            what = "features" if name == "features" else "latent"
            raise UserError(
                f"{models[name]}: the {what} of image {batch.indices[wrong[0]]} is not "
                "finite or too large for float16; use --dtype=float32, or check the "
                "weights"
            )
    statistics.add(batch.arrays["mean"], batch.arrays["std"])
    rows = zip(batch.indices, batch.labels, pngs(batch.images), strict=True)
    for row, (index, label, image) in enumerate(rows):
        arrays = {name: x[row] for name, x in halves.items()}
        writer.write(label=label, index=index, image=image, **arrays)


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
    store = "keep the cropped images too, as PNG, for methods that need them"
    add("--store_images", action="store_true", help=store)
    stored = "store the patch features of this DINOv2: folder, hub id, or digits"
    add("--encoder", default="", metavar="MODEL", help=stored)
    tokens = "features on a side (half the latent's side, as for patches of 2)"
    add("--grid", type=int, default=0, help=tokens)
    add("--shards", type=int, help="number of files (by default from the size)")
    add("--batch_size", type=int, default=64, help="images per call (%(default)s)")
    bad = "share of unreadable images to leave out and list (%(default)s)"
    add("--max_bad", type=float, default=0.01, help=bad)
    dtypes = ("float32", "bfloat16")
    kind = "compute type of the networks (%(default)s)"
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
