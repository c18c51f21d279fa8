"""Make a dataset of latents that exist: python -m sra2_jax import-latents SOURCE.

SOURCE is what REPA's and SRA's preprocessing leaves, a folder `vae-sd` with
`dataset.json` and an .npy of each image (or the folder that holds it); or arrays: an
.npz, or a folder of .npy, with `moments` (mean, then deviation), or `mean` and `std`,
and `labels`. A folder of .npy is mapped, not read into memory; of an .npz each array is
read whole. Channels are first or last. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sra2_jax.command import Parser
from sra2_jax.data import records
from sra2_jax.data.build import Build
from sra2_jax.data.options import Options, option
from sra2_jax.errors import UserError
from sra2_jax.weights import load_vae

Shape = tuple[int, int, int]
LISTING = "dataset.json"
ARRAYS = ("moments", "mean", "std", "labels")


@dataclass(frozen=True)
class ImportOptions(Options):
    """What a dataset of latents that exist is made with."""

    source: str = ""
    num_classes: int = option(0, "by default the largest label and one")
    logvar: bool = option(
        False, "moments hold the logarithm of the variance, not the deviation"
    )
    channels: str = option(
        "",
        "of the axes, for arrays whose shape fits both",
        choices=("first", "last"),
    )


@dataclass(frozen=True)
class Latents:
    """A listing of latents.

    Attributes:
      labels: (N,) int64.
      fingerprint: changes with the listing.
      load: position -> mean and deviation, each (h, w, c), in the type of the source.
    """

    labels: np.ndarray
    fingerprint: str
    load: Callable[[int], tuple[np.ndarray, np.ndarray]]


def import_latents(options: ImportOptions) -> records.LatentsInfo | None:
    """Import latents, see the top of this module.

    Returns:
      The description of the dataset, None while other processes have shards to write.

    Raises:
      UserError: a source that cannot be understood, latents of another shape or not
        finite in float16, something else in `out`.
    """
    module, _ = load_vae(options.vae)
    config, source = module.config, options.source
    shape = options.latent_shape(config)
    found = open_latents(Path(source), shape, options.logvar, options.channels)
    classes = options.num_classes or int(found.labels.max()) + 1
    if found.labels.min() < 0 or found.labels.max() >= classes:
        raise UserError(f"{source}: labels are not in [0, {classes}): --num_classes")
    length = len(found.labels)
    shards = options.choose_shards(length, 4 * math.prod(shape))
    made_with = {
        "imported": source,
        "listing": found.fingerprint,
        "split": options.split,
        "vae": options.vae,
        "resolution": options.resolution,
        "shards": shards,
        "num_classes": classes,
        "logvar": options.logvar,
        "channels": options.channels,
    }

    def load(index: int) -> tuple[int, np.ndarray, np.ndarray]:
        mean, std = found.load(index)
        if (std < 0).any():
            raise UserError(
                f"{source}: latent {index} has negative deviations: they may be "
                "logarithms of the variance, try --logvar"
            )
        return index, mean, std

    with Build(options, shards, made_with) as build, ThreadPoolExecutor(16) as pool:
        for group in build.left():
            with build.writing(group) as writer:
                indices = range(group[0], length, shards)
                for index, mean, std in pool.map(load, indices):
                    label = int(found.labels[index])
                    writer.write(label, index, mean=mean, std=std)
        return build.finish(
            vae=options.vae,
            resolution=options.resolution,
            latent_shape=shape,
            num_classes=classes,
            class_names=(),
            crop="imported",
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor,
        )


def open_latents(
    source: Path, shape: Shape, logvar: bool, channels: str = ""
) -> Latents:
    """List the latents of a source, as (h, w, c) = shape.

    Raises:
      UserError: nothing that can be understood.
    """
    for folder in (source, source / "vae-sd"):
        if (folder / LISTING).is_file():
            return _files(folder, shape, logvar)
    if source.is_dir():
        paths = {name: source / f"{name}.npy" for name in ARRAYS}
        arrays = {n: _array(path) for n, path in paths.items() if path.is_file()}
    elif source.suffix == ".npz" and source.is_file():
        arrays = _members(source)
    else:
        raise UserError(
            f"{source}: no folder with {LISTING} or .npy arrays, and no .npz; see "
            "sra2 import-latents --help"
        )
    return _arrays(source, arrays, shape, logvar, channels)


def _files(folder: Path, shape: Shape, logvar: bool) -> Latents:
    path = folder / LISTING
    try:
        text = path.read_bytes()
        rows = json.loads(text)["labels"]
        names = [PurePosixPath(name) for name, _ in rows]
        labels = [label for _, label in rows]
        if not rows or any(type(label) is not int for label in labels):
            raise ValueError("no integer labels")
        if len(set(names)) != len(names):
            raise ValueError("a file is named twice")
        for name in names:
            if name.is_absolute() or ".." in name.parts or name.suffix != ".npy":
                raise ValueError(f"{str(name)!r} is no .npy inside this folder")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f'{path}: needs {{"labels": [["00000/NAME.npy", 0], ...]}} with a number '
            f"for each ({error}): make it anew"
        ) from None
    order = sorted(range(len(names)), key=lambda i: rows[i][0])  # upstream's order

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        file = folder / names[order[index]]
        return _split(_array(file), shape, logvar, "first", file)

    return Latents(np.array(labels, np.int64)[order], _digest(text), load)


def _arrays(
    source: Path,
    arrays: Mapping[str, np.ndarray],
    shape: Shape,
    logvar: bool,
    channels: str,
) -> Latents:
    used = ["moments"] if "moments" in arrays else ["mean", "std"]
    if not {"labels", *used} <= arrays.keys():
        raise UserError(
            f"{source}: has the arrays {sorted(arrays)}; needs labels, and moments or "
            "mean and std"
        )
    labels = arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{source}: labels must be integers, one for each latent")
    for name in used:
        if arrays[name].shape[:1] != labels.shape:
            raise UserError(
                f"{source}: {name} {arrays[name].shape} for {len(labels)} labels"
            )

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        where = f"{source}, latent {index}"
        if used == ["moments"]:
            return _split(arrays["moments"][index], shape, logvar, channels, where)
        mean, std = (
            _channels_last(arrays[n][index], shape, channels, where) for n in used
        )
        return mean, std

    facts = [(n, arrays[n].shape, arrays[n].dtype.str) for n in used]
    digest = _digest(repr(facts).encode() + np.ascontiguousarray(labels).tobytes())
    return Latents(labels.astype(np.int64), digest, load)


def _split(
    moments: np.ndarray, shape: Shape, logvar: bool, channels: str, where: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, (h, w, c) each."""
    h, w, c = shape
    joined = _channels_last(moments, (h, w, 2 * c), channels, where)
    mean, second = joined[..., :c], joined[..., c:]
    # As diffusers and LDM bound it.
    return mean, np.exp(np.clip(second, -30.0, 20.0) / 2) if logvar else second


def _channels_last(
    array: np.ndarray, shape: Shape, channels: str, where: Any
) -> np.ndarray:
    h, w, c = shape
    first = array.shape == (c, h, w) and channels != "last"
    last = array.shape == (h, w, c) and channels != "first"
    if array.dtype.kind != "f" or not (first or last):
        raise UserError(
            f"{where}: {array.dtype} {array.shape}, not floating-point {(c, h, w)} or "
            f"{(h, w, c)}; --vae and --resolution decide that"
        )
    if first and last:
        raise UserError(f"{where}: give --channels=first or last, {shape} fits both")
    return np.moveaxis(array, 0, -1) if first else array


def _array(path: Path) -> np.ndarray:
    """An .npy, not in memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive")
        return array
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, ".npy", error) from None


def _members(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {
                name: np.asarray(archive[name]) for name in ARRAYS if name in archive
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, ".npz", error) from None


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: no {kind} that can be read ({reason})")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Import as the flags say and print what was done."""
    parser = Parser(
        prog="sra2 import-latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, or .npz")
    ImportOptions.add_flags(parser)
    info = import_latents(ImportOptions(**vars(parser.parse_args())))
    if info is None:
        print("all shards of this process are written; the others' are missing")
    else:
        print(f"{info.num_examples:,} latents imported")
