"""Encode images once into a dataset of latents: python -m sra2_jax encode.

Images are decoded and cropped in threads while the devices run the encoder of the VAE
and this thread writes. The dataset appears under its name only when it is complete;
killed, the same command goes on with the shards that are left.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from sra2_jax.command import run_program
from sra2_jax.data import images as image_sources
from sra2_jax.data import records
from sra2_jax.data.build import (
    Build,
    building,
    choose_shards,
    latent_shape,
    record_size,
)
from sra2_jax.data.check import run_check
from sra2_jax.data.encoders import (
    Batch,
    Encoder,
    VAEEncoder,
    WithFeatures,
    encoded,
    rounded,
)
from sra2_jax.data.images import Readable
from sra2_jax.data.shards import ShardWriter
from sra2_jax.errors import UserError
from sra2_jax.models.vae import VAEConfig
from sra2_jax.weights import load_vae


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
    mirror: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> records.LatentsInfo | None:
    """Encode every image of a source into a new dataset of latents.

    Begins where an earlier call with the same arguments was interrupted. The result is
    the same, byte for byte, on the same kind of device.

    Args:
      images: source, see `images.open_source`.
      out: local folder to make; may exist only if empty, or complete already.
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
      mirror: also a record of each image mirrored left to right, before the VAE.
      process_index, process_count: this process writes every process_count-th shard.
      progress: called with this process's images, done and in all, after each batch.

    Returns:
      The description of the dataset, None while other processes have shards to write.

    Raises:
      UserError: no images, too many unreadable, something else in `out`, other
        arguments than the work began with, a resolution or number of shards that does
        not fit, numbers not finite in float16.
    """
    source = image_sources.open_source(images, split)
    config, run, shape, features = _networks(vae, resolution, encoder, grid, dtype)
    size = record_size(shape, resolution if store_images else 0, features)
    shards = choose_shards(shards, source.length, (1 + mirror) * size)
    options = {
        "images": os.fspath(images),
        "listing": source.fingerprint,
        "split": split,
        "vae": vae,
        "weights": run.weights,
        "resolution": resolution,
        "store_images": store_images,
        "encoder": encoder,
        "grid": features.grid if features else 0,
        "shards": shards,
        "batch_size": rounded(batch_size),
        "dtype": dtype,
        "mirror": mirror,
    }
    processes = {"process_index": process_index, "process_count": process_count}
    # The mirrored image's record is in the same shard.
    mirror_offset = mirror * math.ceil(source.length / shards) * shards
    readable = functools.partial(
        Readable,
        source,
        resolution,
        name=images,
        max_bad=max_bad,
        mirror_offset=mirror_offset,
    )
    models = {"mean": vae, "std": vae, "features": encoder}
    with building(out, split, shards, options, **processes) as build:
        with _PNGs(store_images) as pngs:
            _write_shards(
                build,
                source,
                readable,
                lambda good: encoded(good, run, batch_size, shards),
                lambda writer, batch: _write(writer, batch, pngs, models),
                progress,
            )
        return build.finish(
            vae=vae,
            resolution=resolution,
            latent_shape=shape,
            num_classes=source.num_classes,
            class_names=source.class_names,
            crop=records.CROP,
            images=store_images,
            features=features,
            mirror_offset=mirror_offset,
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor,
        )


def _write_shards(
    build: Build,
    source: image_sources.ImageSource,
    readable: Callable[..., Readable],
    batches: Callable[[Readable], Iterable[Batch]],
    write: Callable[[ShardWriter, Batch], None],
    progress: Callable[[int, int], None],
) -> None:
    """Write the shards of this process that are left."""

    def images(shards: Iterable[int]) -> int:
        return sum(len(range(s, source.length, build.shards)) for s in shards)

    groups = list(build.groups(source.at_once))
    total = images(build.own)
    done = total - images(itertools.chain(*groups))
    for group in groups:
        bad = len(build.unreadable())
        good = readable(bad=bad, stride=build.shards, offsets=group)
        with build.writing(group, good.unreadable) as writer:
            for batch in batches(good):
                write(writer, batch)
                progress(done + good.seen, total)
        done += good.seen


def _networks(
    vae: str, resolution: int, encoder: str, grid: int, dtype: str
) -> tuple[VAEConfig, Encoder, tuple[int, int, int], records.Features | None]:
    """The VAE's config, what runs on a batch, a latent's shape, the features."""
    module, params = load_vae(vae)
    shape = latent_shape(module.config, resolution, vae)
    run = VAEEncoder(module.clone(dtype=dtype), params)
    if not encoder:
        if grid:
            raise UserError(f"--grid={grid} is of features: give --encoder=MODEL too")
        return module.config, run, shape, None
    grid = grid or max(shape[0] // 2, 1)
    both = WithFeatures(run, encoder, grid, dtype)
    features = records.Features(encoder, grid, both.width)
    return module.config, both, shape, features


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
    writer: ShardWriter,
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
    rows = zip(batch.indices, batch.labels, pngs(batch.images), strict=True)
    for row, (index, label, image) in enumerate(rows):
        arrays = {name: x[row] for name, x in halves.items()}
        writer.write(label=label, index=index, image=image, **arrays)


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sra2_jax encode", description=__doc__.partition("\n\n")[0]
    )
    add = parser.add_argument
    source = "folder with one sub-folder per class, tfds:NAME[:SPLIT], or digits"
    add("--images", metavar="SOURCE", help=source)
    add("--out", metavar="DIR", help="local folder to make")
    add("--vae", metavar="VAE", help="diffusers folder or hub id")
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
    mirrored = "also a record of each image mirrored: an epoch is twice as long"
    add("--mirror", action="store_true", help=mirrored)
    count = "processes that share the work, each with the same other flags"
    add("--process_count", type=int, default=1, metavar="N", help=count)
    add("--process_index", type=int, default=0, metavar="I", help="of this one, from 0")
    verify = "read a dataset and name its damaged shards, instead of encoding"
    add("--check", metavar="DIR", help=verify)
    arguments = parser.parse_args()
    missing = [f"--{n}" for n in ("images", "out", "vae") if not vars(arguments)[n]]
    if arguments.check is None and missing:
        parser.error(f"{' and '.join(missing)} must be given")
    return arguments


def main() -> int | None:
    """Encode as the flags say and print what was done, or check a dataset."""
    start = time.monotonic()
    flags = vars(_arguments())
    if folder := flags.pop("check"):
        return run_check(folder)
    info = encode(**flags, progress=_Meter())
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


if __name__ == "__main__":
    run_program(main)
