"""ADM's .npz files of images and reference statistics; other sets by their spec.

An .npz may be larger than the memory: its images are read and written batch by batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from sra2_jax.errors import UserError
from sra2_jax.metrics.moments import check_gaussian
from sra2_jax.metrics.sets import ImageSet, open_dataset, open_folder

IMAGES, LABELS, SETTINGS = "arr_0", "arr_1", "settings"
SMALL = 2**28  # bytes; Inception's covariance has 2**25
STATISTICS = (("mu", "sigma"), ("mu_s", "sigma_s"))


@dataclass(frozen=True)
class Reference:
    """Statistics to compare with, or images to take them from, or both.

    Attributes:
      name: as the user gave it.
      mu, sigma: float64 (D,), (D, D) of the pool features.
      mu_s, sigma_s: the same of the spatial features.
      images: some of the images, or all.
      settings: how the file was made, where it says so.
    """

    name: str
    mu: np.ndarray | None
    sigma: np.ndarray | None
    mu_s: np.ndarray | None
    sigma_s: np.ndarray | None
    images: ImageSet | None
    settings: dict[str, Any] | None


def open_images(
    spec: str, resolution: int | None = None, split: str = "train"
) -> ImageSet:
    """Open a set of images without reading it whole.

    Args:
      spec: an .npz with uint8 NHWC images as arr_0 (ADM's sample files) and perhaps
        labels as arr_1 and settings (a JSON text); a folder with images at any depth,
        in the order of their paths; tfds:NAME[:SPLIT]; or digits.
      resolution: side to which folders and datasets are cropped by ADM's rule. Datasets
        need it, folders only if their images differ in size.
      split: of a dataset, where `spec` names none.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"resolution is {resolution}: give pixels, at least 1")
    if spec == "digits" or spec.startswith("tfds:"):
        return open_dataset(spec, resolution, split)
    path = epath.Path(spec)
    if path.is_dir():
        return open_folder(Path(spec), resolution)
    with _opened(path) as archive:
        return _images_of(archive, path)


def open_reference(
    spec: str, resolution: int | None = None, split: str = "train"
) -> Reference:
    """Open what samples are compared with.

    Args:
      spec: an .npz with mu and sigma, perhaps mu_s and sigma_s (ADM's reference files,
        VIRTUAL_imagenet256_labeled.npz), or arr_0, or both; else as `open_images`.
      resolution, split: as `open_images`.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    path = epath.Path(spec)
    if spec == "digits" or spec.startswith("tfds:") or path.is_dir():
        images = open_images(spec, resolution, split)
        return Reference(spec, None, None, None, None, images, None)
    with _opened(path) as archive:
        statistics = _statistics_of(archive, path)
        # A file with neither is told that it lacks images.
        with_images = IMAGES in _keys(archive) or not statistics
        return Reference(
            spec,
            statistics.get("mu"),
            statistics.get("sigma"),
            statistics.get("mu_s"),
            statistics.get("sigma_s"),
            _images_of(archive, path) if with_images else None,
            _settings_of(archive),
        )


# .npz files


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[zipfile.ZipFile]:
    """An .npz to read; a damage found while it is open becomes a UserError."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder: give an .npz, a folder of images, "
            "tfds:NAME[:SPLIT] or digits"
        )
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "pickle" in reason:  # numpy's text says how to load them unsafely
            reason = "it holds Python objects"
        raise UserError(
            f"{path}: not a whole .npz file ({reason}): fetch or make it again"
        ) from error


def _keys(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


def _read(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """A small array; ValueError if it is damaged, not small or holds objects."""
    if archive.getinfo(f"{key}.npy").file_size > SMALL:
        raise ValueError(f"{key} has more than {SMALL:,} bytes")
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype; leaves `member` at the data."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _images_of(archive: zipfile.ZipFile, path: epath.Path) -> ImageSet:
    keys = _keys(archive)
    if IMAGES not in keys:
        raise UserError(
            f"{path}: has no {IMAGES}, only {', '.join(keys) or 'nothing'}: save uint8 "
            f"images (N, H, W, 3) as {IMAGES}"
        )
    with archive.open(f"{IMAGES}.npy") as member:
        shape, fortran, dtype = _read_header(member)
        wrong = _what_is_wrong(shape, fortran, dtype)
        if wrong:
            raise UserError(f"{path}: {IMAGES} {wrong}")
        size = member.tell() + math.prod(shape)
    stored = archive.getinfo(f"{IMAGES}.npy").file_size
    if stored != size:
        raise UserError(
            f"{path}: {IMAGES} has {stored:,} bytes, not {size:,}: fetch or make it "
            "again"
        )
    labels = None
    if LABELS in keys:
        labels = _read(archive, LABELS)
        if labels.dtype.kind not in "iu" or labels.shape != shape[:1]:
            raise UserError(
                f"{path}: {LABELS} is {labels.dtype} {labels.shape}: an integer label "
                f"for each of the {shape[0]} images expected, or no {LABELS}"
            )
        labels = labels.astype(np.int64)
    height, width = shape[1:3]
    return ImageSet(
        str(path),
        shape[0],
        (height, width, 3),
        labels,
        _settings_of(archive),
        functools.partial(_stream, path, shape),
    )


def _what_is_wrong(shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> str:
    """Empty if the images are as ADM has them."""
    if dtype.hasobject:
        return "holds Python objects, which are never loaded: save a uint8 array"
    if dtype != np.uint8:
        return f"is {dtype}: uint8 0..255 expected"
    if len(shape) == 4 and shape[1] == 3 != shape[3]:
        return f"has shape {shape}: transpose it to NHWC, (N, H, W, 3)"
    if len(shape) != 4 or shape[3] != 3:
        return f"has shape {shape}: (N, H, W, 3) expected; repeat grey, drop alpha"
    if not math.prod(shape):
        return f"has shape {shape}: there are no images in it"
    if fortran:
        return "is in Fortran's order: save np.ascontiguousarray of it"
    return ""


def _stream(
    path: epath.Path, shape: tuple[int, ...], size: int
) -> Iterator[np.ndarray]:
    row = math.prod(shape[1:])
    with _opened(path) as archive, archive.open(f"{IMAGES}.npy") as member:
        if _read_header(member)[0] != shape:
            raise ValueError("it changed since it was opened")
        for start in range(0, shape[0], size):
            n = min(size, shape[0] - start)
            data = np.frombuffer(member.read(n * row), np.uint8)
            yield data.reshape(n, *shape[1:])


def _settings_of(archive: zipfile.ZipFile) -> dict[str, Any] | None:
    """The JSON object in a text; None if there is none: nothing depends on it."""
    if SETTINGS not in _keys(archive):
        return None
    try:
        settings = json.loads(str(_read(archive, SETTINGS)))
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def _statistics_of(archive: zipfile.ZipFile, path: epath.Path) -> dict[str, np.ndarray]:
    """The pairs of mean and covariance that a file has, float64, checked."""
    keys = _keys(archive)
    found: dict[str, np.ndarray] = {}
    for pair in STATISTICS:
        has = [key for key in pair if key in keys]
        if len(has) == 1:
            other = pair[1 - pair.index(has[0])]
            raise UserError(
                f"{path}: has {has[0]} but no {other}, only {', '.join(keys)}: make it "
                "again with both"
            )
        if has:
            arrays = [_read(archive, key) for key in pair]
            try:
                if any(array.dtype.kind not in "fiu" for array in arrays):
                    raise UserError("real numbers expected")
                mean, cov = (array.astype(np.float64) for array in arrays)
                check_gaussian(mean, cov)
            except UserError as error:
                names = " and ".join(pair)
                raise UserError(f"{path}: {names}: {error}: make it again") from error
            found |= dict(zip(pair, (mean, cov), strict=True))
    if "mu_s" in found and "mu" not in found:
        raise UserError(f"{path}: has mu_s but no mu: make it again with both")
    return found


def write_npz(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    images: Iterable[np.ndarray] | None = None,
    shape: tuple[int, ...] = (),
) -> None:
    """Write an .npz that np.load, and so ADM's evaluator, opens; never half of one.

    Args:
      path: replaced if it exists; its folder is made.
      arrays: name -> array, written whole.
      images: batches of uint8 (n, H, W, 3) to write one after the other as arr_0.
      shape: (N, H, W, 3) of all images together.

    Raises:
      UserError: the file cannot be written; whatever `images` raises.
      ValueError: the images are not of that shape, or not N.
    """
    target = epath.Path(path)
    fresh = target.parent / f"{target.name}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                # Else members beyond 2 GB, whose size is not known yet, would fail.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            if images is not None:
                with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
                    _write_images(member, images, shape)
        fresh.replace(target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{path}: cannot be written ({reason}): free space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _write_images(
    member: IO[bytes], images: Iterable[np.ndarray], shape: tuple[int, ...]
) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    seen = 0
    for batch in images:
        if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
            raise ValueError(
                f"batch of {batch.dtype} {batch.shape[1:]}: uint8 {shape[1:]} promised"
            )
        member.write(np.ascontiguousarray(batch).data)
        seen += len(batch)
    if seen != shape[0]:
        raise ValueError(f"{seen} images came, {shape[0]} were promised")
