"""Make a dataset of latents that exist: python -m sra2_jax import-latents SOURCE.

SOURCE is what REPA's and SRA's preprocessing leaves, a folder `vae-sd` with
`dataset.json` and an .npy of each image (or the folder that holds it); or arrays: an
.npz, or a folder of .npy, with `moments` (mean, then deviation), or `mean` and `std`,
and `labels`. Channels are first or last. Killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sra2_jax.command import run_program
from sra2_jax.data import records
from sra2_jax.data.build import building, choose_shards, latent_shape, record_size
from sra2_jax.data.images import positions
from sra2_jax.errors import UserError
from sra2_jax.weights import load_vae

Shape = tuple[int, int, int]
LISTING = "dataset.json"


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


def import_latents(
    source: str | os.PathLike,
    out: str | os.PathLike,
    vae: str,
    resolution: int,
    *,
    split: str = "train",
    shards: int | None = None,
    num_classes: int | None = None,
    logvar: bool = False,
    channels: str = "",
) -> records.LatentsInfo:
    """Import latents, see the top of this module.

    Args:
      out: local folder to make.
      vae: what encoded them, see `pretrained.load_vae`; its scaling is noted.
      resolution: of the images, in pixels.
      shards: number of files; None: from the size.
      num_classes: None: the largest label and one.
      logvar: the second half of moments is the logarithm of the variance.
      channels: "first" or "last" of the axes, for arrays whose shape fits both.

    Raises:
      UserError: a source that cannot be understood, latents of another shape or not
        finite in float16, something else in `out`.
    """
    module, _ = load_vae(vae)
    config = module.config
    shape = latent_shape(config, resolution, vae)
    found = open_latents(Path(source), shape, logvar, channels)
    classes = num_classes or int(found.labels.max()) + 1
    if found.labels.min() < 0 or found.labels.max() >= classes:
        raise UserError(f"{source}: labels are not in [0, {classes}): --num_classes")
    length = len(found.labels)
    shards = choose_shards(shards, length, record_size(shape))
    options = {
        "imported": os.fspath(source),
        "listing": found.fingerprint,
        "split": split,
        "vae": vae,
        "resolution": resolution,
        "shards": shards,
        "num_classes": classes,
        "logvar": logvar,
        "channels": channels,
    }
    with building(out, split, shards, options) as build, ThreadPoolExecutor(16) as pool:
        for group in build.groups(1):
            with build.writing(group, []) as writer:
                wanted = list(positions(length, shards, group))
                rows = pool.map(lambda i: _halves(found, i, source), wanted)
                for index, (mean, std) in zip(wanted, rows, strict=True):
                    writer.write(mean, std, int(found.labels[index]), index)
        info = build.finish(
            vae=vae,
            resolution=resolution,
            latent_shape=shape,
            num_classes=classes,
            class_names=(),
            crop="imported",
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor,
        )
    assert info is not None  # one process writes all
    return info


def _halves(found: Latents, index: int, source: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        mean, std = (x.astype(np.float16) for x in found.load(index))
    if not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError(
            f"{source}: latent {index} is not finite or too large for float16; encode "
            f"the images anew ({records.ENCODE})"
        )
    if (std < 0).any():
        raise UserError(
            f"{source}: latent {index} has negative deviations: they may be logarithms "
            "of the variance, try --logvar"
        )
    return mean, std


def open_latents(
    source: Path, shape: Shape, logvar: bool, channels: str = ""
) -> Latents:
    """List the latents of a source, as (h, w, c) = shape; reads none yet.

    Raises:
      UserError: nothing that can be understood.
    """
    for folder in (source, source / "vae-sd"):
        if (folder / LISTING).is_file():
            return _files(folder, shape, logvar)
    if source.is_dir():
        names = ("moments", "mean", "std", "labels")
        paths = {n: source / f"{n}.npy" for n in names}
        arrays = {n: _mapped(p) for n, p in paths.items() if p.is_file()}
    elif source.suffix == ".npz" and source.is_file():
        arrays = _members(source)
    else:
        raise UserError(
            f"{source}: no folder with {LISTING} or .npy arrays, and no .npz; see "
            "python -m sra2_jax import-latents --help"
        )
    return _arrays(source, arrays, shape, logvar, channels)


def _files(folder: Path, shape: Shape, logvar: bool) -> Latents:
    path = folder / LISTING
    try:
        text = path.read_bytes()
        rows = json.loads(text)["labels"]
        names = [name for name, _ in rows]
        labels = [label for _, label in rows]
        good = all(isinstance(n, str) for n in names)
        good = good and all(type(label) is int for label in labels)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good or not names:
        raise UserError(
            f'{path}: needs {{"labels": [["00000/NAME.npy", 0], ...]}} with a number '
            "for each; make it anew"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{path}: names a file twice; make it anew")
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.suffix != ".npy":
            raise UserError(f"{path}: {name!r} is no .npy inside this folder")
    order = sorted(range(len(names)), key=names.__getitem__)  # upstream's order

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        file = folder / names[order[index]]
        return _split(_mapped(file), shape, logvar, "first", file)

    return Latents(np.array(labels, np.int64)[order], _digest(text), load)


def _arrays(
    source: Path,
    arrays: Mapping[str, np.ndarray],
    shape: Shape,
    logvar: bool,
    channels: str,
) -> Latents:
    if "labels" not in arrays or not (
        "moments" in arrays or {"mean", "std"} <= arrays.keys()
    ):
        raise UserError(
            f"{source}: has the arrays {sorted(arrays)}; needs labels, and moments or "
            "mean and std"
        )
    labels = arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{source}: labels must be integers, one for each latent")
    used = ["moments"] if "moments" in arrays else ["mean", "std"]
    for name in used:
        if len(arrays[name]) != len(labels):
            raise UserError(
                f"{source}: {len(arrays[name])} {name} for {len(labels)} labels"
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


def _mapped(path: Path) -> np.ndarray:
    """An .npy, not in memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive")
        return array
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no .npy that can be read ({reason})") from None


def _members(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, not in memory."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            # Below, the sums in an archive are not looked at.
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path}: is compressed and would have to be read whole; "
                        f"unpack it (unzip {path.name} -d FOLDER), import the folder"
                    )
                # The local header's own lengths; those of the directory may differ.
                file.seek(member.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), "<u2").tolist()
                file.seek(name + extra, os.SEEK_CUR)
                start, array = file.tell(), _member(path, file)
                if array.offset - start + array.nbytes > member.file_size:
                    raise ValueError(f"{member.filename} is cut short")
                arrays[member.filename.removesuffix(".npy")] = array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: no .npz that can be read ({reason})") from None
    return arrays


def _member(path: Path, file: Any) -> np.memmap:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"version {version} of .npy")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    order: Any = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", file.tell(), shape, order)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sra2_jax import-latents",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, or .npz")
    add("--out", required=True, metavar="DIR", help="local folder to make")
    vae = "diffusers folder or hub id of the VAE that encoded them"
    add("--vae", required=True, metavar="VAE", help=vae)
    add("--resolution", type=int, default=256, help="pixels (%(default)s)")
    add("--split", default="train", help="name of the split (%(default)s)")
    add("--shards", type=int, help="number of files (by default from the size)")
    add("--num_classes", type=int, help="by default the largest label and one")
    second = "moments hold the logarithm of the variance, not the deviation"
    add("--logvar", action="store_true", help=second)
    both = "of the axes, for arrays whose shape fits both"
    add("--channels", choices=("first", "last"), default="", help=both)
    return parser.parse_args()


def main() -> None:
    """Import as the flags say and print what was done."""
    info = import_latents(**vars(_arguments()))
    print(f"{info.num_examples:,} latents imported")


if __name__ == "__main__":
    run_program(main)
