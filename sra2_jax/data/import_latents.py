"""Make a dataset of latents that exist: python -m sra2_jax import-latents SOURCE.

SOURCE is what REPA's and SRA's preprocessing leaves, a folder `vae-sd` with
`dataset.json` and an .npy of each image (or the folder that holds it); or arrays: an
.npz, or a folder of .npy, with `moments` (mean, then deviation), or `mean` and `std`,
and `labels`. A folder of .npy is mapped, not read into memory; of an .npz each array is
read whole. Channels are first or last. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sra2_jax.command import Parser
from sra2_jax.data import records
from sra2_jax.data.build import WAITING, Build, ShardWriter
from sra2_jax.data.options import Options, option
from sra2_jax.errors import UserError, explained
from sra2_jax.weights import load_vae

Shape = tuple[int, int, int]
HELP = "see sra2 import-latents --help"
LISTING = "dataset.json"
ARRAYS = ("moments", "mean", "std", "labels")
MADE_WITH = (
    "imported", "listing", "split", "vae", "resolution", "shards", "num_classes",
    "logvar", "channels",
)  # fmt: skip


@dataclass(frozen=True)
class ImportOptions(Options):
    """What a dataset of latents that exist is made with."""

    source: str = ""
    num_classes: int = option(0, "by default the largest label and one")
    logvar: bool = option(
        False, "moments hold the logarithm of the variance, not the deviation"
    )
    channels: str = option(
        "", "of the axes, where a shape fits both", choices=("first", "last")
    )


@dataclass(frozen=True)
class Latents:
    """A listing of latents.

    labels: (N,) integers; listed: what changes with the listing; load: position ->
    moments alone, or mean and deviation, as they are stored; where: position -> where
    that is, for messages; channels: "first" where the kind of source says it.
    """

    labels: np.ndarray
    listed: bytes
    load: Callable[[int], list[np.ndarray]]
    where: Callable[[int], Any]
    channels: str = ""


def import_latents(options: ImportOptions) -> records.LatentsInfo | None:
    """Import latents, see the top of this module.

    Returns the description of the dataset, None while other processes have shards to
    write.

    Raises UserError: a source that cannot be understood, latents of another shape or
    not finite in float16, something else in `out`.
    """
    vae, source = load_vae(options.vae)[0].config, options.source
    shape = options.latent_shape(vae)
    with explained(f"{source}: cannot be imported", HELP):
        latents = open_latents(Path(source))
    labels = latents.labels
    classes = options.num_classes or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{source}: labels are not in [0, {classes}): --num_classes")
    options = options.sharded(len(labels), 4 * math.prod(shape))
    options = dataclasses.replace(options, num_classes=classes)
    listing = hashlib.sha256(latents.listed).hexdigest()
    facts = vars(options) | {"imported": source, "listing": listing}

    def load(index: int) -> tuple[int, np.ndarray, np.ndarray]:
        with explained(f"{latents.where(index)}: cannot be imported", HELP):
            parts = latents.load(index)
            channels = latents.channels or options.channels
            return index, *_mean_and_std(parts, shape, channels, options.logvar)

    def write(writer: ShardWriter, indices: Sequence[int]) -> Iterator[int]:
        with ThreadPoolExecutor(16) as pool:
            for index, mean, std in pool.map(load, indices):
                writer.write(int(labels[index]), index, mean=mean, std=std)
                yield 1

    build = Build(options, vae, {name: facts[name] for name in MADE_WITH})
    return build.run(
        len(labels), write, num_classes=classes, class_names=(), crop="imported"
    )


def open_latents(source: Path) -> Latents:
    """List the latents of a source.

    Raises ValueError and others: nothing that can be understood.
    """
    for folder in (source, source / "vae-sd"):
        if (folder / LISTING).is_file():
            return _files(folder)
    if source.is_dir():
        paths = {name: source / f"{name}.npy" for name in ARRAYS}
        arrays = {name: _mapped(path) for name, path in paths.items() if path.exists()}
        return _arrays(source, arrays)
    # Opened here: np.load leaves a file that is no archive open.
    with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in ARRAYS if name in archive}
        return _arrays(source, arrays)


def _files(folder: Path) -> Latents:
    """What `dataset.json` lists, in upstream's order, that of the names."""
    text = (folder / LISTING).read_bytes()
    rows = sorted(json.loads(text)["labels"], key=lambda row: row[0])
    names, labels = [PurePosixPath(name) for name, _ in rows], [row[1] for row in rows]
    if not rows or any(type(label) is not int for label in labels):
        raise ValueError(f'{LISTING} needs {{"labels": [["00000/NAME.npy", 0], ...]}}')
    if len(set(names)) != len(names):
        raise ValueError(f"{LISTING} names a file twice")
    for name in names:
        if name.is_absolute() or ".." in name.parts or name.suffix != ".npy":
            raise ValueError(f"{LISTING}: {str(name)!r} is no .npy inside this folder")

    paths = [folder / name for name in names]

    def load(index: int) -> list[np.ndarray]:
        return [_mapped(paths[index])]

    return Latents(np.array(labels, np.int64), text, load, paths.__getitem__, "first")


def _arrays(source: Path, arrays: Mapping[str, np.ndarray]) -> Latents:
    used = ["moments"] if "moments" in arrays else ["mean", "std"]
    if not {"labels", *used} <= arrays.keys():
        raise ValueError(
            f"it has the arrays {sorted(arrays)}; needs labels, and moments or mean "
            "and std"
        )
    labels, shapes = arrays["labels"], [arrays[name].shape for name in used]
    counts = {labels.shape, *(shape[:1] for shape in shapes)}
    if labels.dtype.kind not in "iu" or counts != {(labels.size,)} or not labels.size:
        raise ValueError(f"{shapes} for labels {labels.shape}: needs an integer each")
    facts = [(n, arrays[n].shape, arrays[n].dtype.str) for n in used]
    listed = repr(facts).encode() + np.ascontiguousarray(labels).tobytes()

    def load(index: int) -> list[np.ndarray]:
        return [arrays[name][index] for name in used]

    return Latents(labels, listed, load, lambda i: f"{source}, latent {i}")


def _mapped(path: Path) -> np.ndarray:
    """An .npy, not in memory; refuses one with pickled objects."""
    return np.lib.format.open_memmap(path, mode="r")


def _mean_and_std(
    parts: Sequence[np.ndarray], shape: Shape, channels: str, logvar: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, (h, w, c) each, of moments or of the two."""
    h, w, c = shape
    stored = h, w, 2 * c // len(parts)
    joined = np.concatenate([_channels_last(x, stored, channels) for x in parts], -1)
    mean, std = joined[..., :c], joined[..., c:]
    if logvar and len(parts) == 1:
        # As diffusers and LDM bound it.
        std = np.exp(np.clip(std, -30.0, 20.0) / 2)
    if (std < 0).any():
        raise ValueError(
            "negative deviations: they may be logarithms of the variance, try --logvar"
        )
    return mean, std


def _channels_last(array: np.ndarray, shape: Shape, channels: str) -> np.ndarray:
    h, w, c = shape
    first = array.shape == (c, h, w) and channels != "last"
    last = array.shape == (h, w, c) and channels != "first"
    if array.dtype.kind != "f" or not (first or last):
        raise ValueError(
            f"{array.dtype} {array.shape}, not floating-point {(c, h, w)} or "
            f"{(h, w, c)}; --vae and --resolution decide that"
        )
    if first and last:
        raise ValueError(f"give --channels=first or last, {shape} fits both")
    return np.moveaxis(array, 0, -1) if first else array


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
    print(f"{info.num_examples:,} latents imported" if info else WAITING)
